//! Connections: hyper under the router, with time limits and an end that lets streams finish.

use std::time::Duration;

use axum::{Router, extract::Request};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto::Builder, graceful::GracefulShutdown},
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, watch},
    task::JoinHandle,
};
use tower::ServiceExt;

/// Seconds to send a request's headers.
const HEADERS: Duration = Duration::from_secs(20);
/// Connections at once; others wait in the system's queue.
const MAX_CONNECTIONS: usize = 4096;

/// The task that accepts connections.
pub struct Http {
    stop: watch::Sender<Option<Duration>>,
    task: JoinHandle<()>,
}

impl Http {
    /// Accepts nothing more and waits for open requests, at most for `grace`.
    pub async fn stop(self, grace: Duration) {
        _ = self.stop.send(Some(grace));
        _ = self.task.await;
    }
}

/// Serves until it is stopped.
pub fn start(listener: TcpListener, router: Router) -> Http {
    let (stop, stopped) = watch::channel(None);
    let task = tokio::spawn(accept(listener, router, stopped));
    Http { stop, task }
}

async fn accept(listener: TcpListener, router: Router, mut stopped: watch::Receiver<Option<Duration>>) {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(Some(HEADERS)).max_concurrent_streams(256);
    let graceful = GracefulShutdown::new();
    let room = std::sync::Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let (connection, permit) = tokio::select! {
            accepted = async {
                let permit = room.clone().acquire_owned().await;
                (listener.accept().await, permit)
            } => accepted,
            _ = stopped.changed() => break,
        };
        let stream = match connection {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, mostly: others will close theirs.
                tracing::warn!("a connection was not accepted: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // Answers are small pieces that should leave at once.
        _ = stream.set_nodelay(true);
        let router = router.clone();
        let service = hyper::service::service_fn(move |request: Request<Incoming>| router.clone().oneshot(request));
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("a connection broke: {error}");
            }
            drop(permit);
        });
    }
    let grace = stopped.borrow().unwrap_or(Duration::ZERO);
    tokio::select! {
        () = graceful.shutdown() => {}
        () = tokio::time::sleep(grace) => {}
    }
}

/// Ctrl-C, or the signal that asks services to end.
pub async fn stop_signal() -> std::io::Result<()> {
    let mut term = signal(SignalKind::terminate())?;
    tokio::select! {
        ended = tokio::signal::ctrl_c() => ended,
        _ = term.recv() => Ok(()),
    }
}

//! Answers in pieces: server-sent events that end with `[DONE]`, errors inside the stream.

use std::convert::Infallible;

use axum::response::{
    IntoResponse, Response, Sse,
    sse::{Event, KeepAlive},
};
use futures::Stream;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

use super::error::envelope;
use crate::service::{
    Problem,
    generate::{Counts, Generation, Piece},
};

/// What several generations give, as it comes: which one, and its piece.
pub type Pieces = mpsc::Receiver<(u64, Result<Piece, Problem>, Counts)>;

/// Runs generations side by side. Dropping the receiver ends them.
pub fn side_by_side(generations: Vec<Generation>) -> Pieces {
    let (sender, receiver) = mpsc::channel(64);
    for mut generation in generations {
        let sender = sender.clone();
        tokio::spawn(async move {
            loop {
                let piece = tokio::select! {
                    piece = generation.next() => piece,
                    () = sender.closed() => return,
                };
                let (piece, is_last) = match piece {
                    Ok(None) => return,
                    Ok(Some(piece)) => (Ok(piece), false),
                    Err(problem) => (Err(problem), true),
                };
                let sent = sender.send((generation.index, piece, generation.counts)).await;
                if sent.is_err() || is_last {
                    return;
                }
            }
        });
    }
    receiver
}

/// Sends what `chunks` gives, then `[DONE]`; an error ends the stream with its envelope.
pub fn respond<T: Serialize + Send + 'static>(chunks: mpsc::Receiver<Result<T, Problem>>) -> Response {
    let events = ReceiverStream::new(chunks).map(|chunk| match chunk {
        Ok(chunk) => serde_json::to_string(&chunk),
        Err(problem) => serde_json::to_string(&envelope(problem)),
    });
    let events = events.map(|text| Event::default().data(text.unwrap_or_default()));
    let done = tokio_stream::once(Event::default().data("[DONE]"));
    sse(events.chain(done).map(Ok))
}

fn sse(events: impl Stream<Item = Result<Event, Infallible>> + Send + 'static) -> Response {
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

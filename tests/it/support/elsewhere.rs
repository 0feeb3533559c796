//! A service of somebody else on this machine: it answers as a test says, and remembers what it was asked.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, Uri},
    response::Response,
};
use serde_json::Value;

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Asked {
    pub path: String,
    /// Of the header `authorization`.
    pub key: Option<String>,
    pub body: Value,
}

type Reply = Pin<Box<dyn Future<Output = Response> + Send>>;
type Script = dyn Fn(usize, Asked) -> Reply + Send + Sync;

struct Site {
    script: Box<Script>,
    asked: Mutex<Vec<Asked>>,
}

pub struct Elsewhere {
    /// `127.0.0.1:PORT`
    pub host: String,
    site: Arc<Site>,
    task: tokio::task::JoinHandle<()>,
}

impl Elsewhere {
    /// `script` gets the number of the request, from 0, and the request.
    pub async fn start<F: Future<Output = Response> + Send + 'static>(
        script: impl Fn(usize, Asked) -> F + Send + Sync + 'static,
    ) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let script: Box<Script> = Box::new(move |n, asked| Box::pin(script(n, asked)));
        let site = Arc::new(Site { script, asked: Mutex::default() });
        let router = Router::new().fallback(answer).with_state(site.clone());
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { host, site, task }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.host)
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.site.asked.lock().unwrap().clone()
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(State(site): State<Arc<Site>>, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let key = headers.get("authorization").map(|value| value.to_str().unwrap().to_owned());
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let asked = Asked { path: uri.path().to_owned(), key, body };
    let n = {
        let mut all = site.asked.lock().unwrap();
        all.push(asked.clone());
        all.len() - 1
    };
    (site.script)(n, asked).await
}

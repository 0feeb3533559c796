//! A small client of our own API.

use anyhow::{Context as _, bail};
use futures::StreamExt;
use serde_json::{Value, json};

pub struct Client {
    http: reqwest::Client,
    url: String,
    key: String,
}

impl Client {
    pub fn new(url: &str, key: &str) -> anyhow::Result<Self> {
        // The server is on this machine: no proxy stands between.
        let http = reqwest::Client::builder().no_proxy().build()?;
        Ok(Self { http, url: url.to_owned(), key: key.to_owned() })
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> anyhow::Result<reqwest::Response> {
        let response = request.bearer_auth(&self.key).send().await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let (status, body) = (response.status(), response.text().await.unwrap_or_default());
        bail!("the server answered {status}: {body}")
    }

    pub async fn get(&self, path: &str) -> anyhow::Result<Value> {
        Ok(self.send(self.http.get(format!("{}{path}", self.url))).await?.json().await?)
    }

    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        Ok(self.send(self.http.post(format!("{}{path}", self.url)).json(body)).await?.json().await?)
    }

    /// A file of this name and size that is there already.
    pub async fn find_file(&self, name: &str, bytes: usize) -> anyhow::Result<Option<String>> {
        let files = self.get("/v1/files?purpose=fine-tune&limit=100").await?;
        let same = |file: &&Value| file["filename"] == name && file["bytes"] == bytes;
        let found = files["data"].as_array().and_then(|files| files.iter().find(same));
        Ok(found.and_then(|file| file["id"].as_str()).map(str::to_owned))
    }

    pub async fn upload(&self, name: &str, content: &'static str) -> anyhow::Result<String> {
        let file = reqwest::multipart::Part::text(content).file_name(name.to_owned());
        let form = reqwest::multipart::Form::new().text("purpose", "fine-tune").part("file", file);
        let file: Value =
            self.send(self.http.post(format!("{}/v1/files", self.url)).multipart(form)).await?.json().await?;
        Ok(file["id"].as_str().context("the file has no id")?.to_owned())
    }

    /// A greedy answer.
    pub async fn answer(&self, model: &str, messages: &[Value]) -> anyhow::Result<String> {
        let body = json!({"model": model, "messages": messages, "temperature": 0, "max_tokens": 64});
        let answer = self.post("/v1/chat/completions", &body).await?;
        Ok(answer["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits for the first text of a streamed answer.
    pub async fn first_token(&self, model: &str, messages: &[Value]) -> anyhow::Result<()> {
        let body = json!({"model": model, "messages": messages, "temperature": 0, "max_tokens": 8, "stream": true});
        let request = self.http.post(format!("{}/v1/chat/completions", self.url)).json(&body);
        let mut stream = self.send(request).await?.bytes_stream();
        let mut text = String::new();
        while let Some(chunk) = stream.next().await {
            text.push_str(&String::from_utf8_lossy(&chunk?));
            let chunks = text.lines().filter_map(|line| line.strip_prefix("data: "));
            let mut chunks = chunks.filter_map(|data| serde_json::from_str::<Value>(data).ok());
            if chunks.any(|c| c["choices"][0]["delta"]["content"].as_str().is_some_and(|text| !text.is_empty())) {
                return Ok(());
            }
        }
        bail!("{model} gave no token: {text}")
    }
}

//! The real binary on a port and a data directory of its own, and a client that knows its key.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
};

use reqwest::{Method, RequestBuilder, Response, multipart};
use serde_json::{Value, json};

use super::{s3, tiny::Tiny};

/// The id of the tiny base.
pub const BASE: &str = "tiny";
/// The bootstrap key, of the project `default`.
pub const KEY: &str = "test-key-of-twenty-letters";

/// A running server. It is killed when this is dropped.
pub struct Server {
    pub url: String,
    data: PathBuf,
    model: PathBuf,
    arguments: Vec<String>,
    child: Child,
    /// Kept open: a server that writes to a closed pipe would die of it.
    _stdout: BufReader<ChildStdout>,
    _dir: tempfile::TempDir,
}

impl Server {
    /// A server with one tiny base, ready for requests.
    pub fn start() -> Self {
        Self::with(&[])
    }

    /// The same with more arguments of `serve`.
    pub fn with(arguments: &[&str]) -> Self {
        Self::prepared(arguments, |_| ())
    }

    /// The same with the base's files changed before it starts.
    pub fn prepared(arguments: &[&str], change: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (model, data) = (dir.path().join("model"), dir.path().join("data"));
        Tiny::default().write(&model);
        change(&model);
        let arguments = arguments.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>();
        let (child, stdout, url) = spawn(&data, &model, &arguments);
        Self { url, data, model, arguments, child, _stdout: stdout, _dir: dir }
    }

    /// SIGKILL, and the same server again on the same data.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.restart();
    }

    /// The same server again, after it was killed.
    pub fn restart(&mut self) {
        (self.child, self._stdout, self.url) = spawn(&self.data, &self.model, &self.arguments);
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The base as `--model` takes it.
    pub fn model_argument(&self) -> String {
        format!("{BASE}={}", self.model.display())
    }

    /// A new key, made by the command line beside the running server.
    pub fn create_key(&self, project: &str, scopes: &str) -> String {
        self.command(&["keys", "create", "--project", project, "--scopes", scopes]).unwrap().trim().to_owned()
    }

    /// Another process of the binary on this server's data directory: what it says, or its complaint.
    pub fn command(&self, arguments: &[&str]) -> Result<String, String> {
        let output = attune(&self.data).args(arguments).env("ATTUNE_API_KEY", KEY).output().unwrap();
        match output.status.success() {
            true => Ok(String::from_utf8(output.stdout).unwrap()),
            false => Err(String::from_utf8(output.stderr).unwrap()),
        }
    }

    /// A worker of its own, with a data directory of its own and the same base, ready for jobs.
    pub fn worker(&self, arguments: &[&str]) -> Worker {
        let dir = tempfile::tempdir().unwrap();
        let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
        let mut command = attune(dir.path());
        let (child, stdout, _) = start(command.arg("worker"), &self.model, &arguments, "waiting for jobs on ");
        Worker { child, _stdout: stdout, _dir: dir }
    }

    /// The process's number.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Where the server keeps everything.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// A client with the bootstrap key.
    pub fn client(&self) -> Client {
        self.client_with(KEY)
    }

    pub fn client_with(&self, key: &str) -> Client {
        Client { http: reqwest::Client::new(), url: self.url.clone(), key: key.to_owned() }
    }
}

/// Starts the binary and waits until it says where it listens.
fn spawn(data: &Path, model: &Path, arguments: &[String]) -> (Child, BufReader<ChildStdout>, String) {
    let mut command = attune(data);
    command.args(["serve", "--listen", "127.0.0.1:0"]).env("ATTUNE_API_KEY", KEY);
    start(&mut command, model, arguments, "listening on ")
}

/// Starts a process and waits for its line that begins so; gives the rest of the line.
fn start(
    command: &mut Command,
    model: &Path,
    arguments: &[String],
    ready: &str,
) -> (Child, BufReader<ChildStdout>, String) {
    command.args(["--threads", "1", "--model"]).arg(format!("{BASE}={}", model.display())).args(arguments);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let rest = line_after(ready, &mut stdout);
    (child, stdout, rest)
}

fn line_after(start: &str, lines: &mut impl BufRead) -> String {
    let mut line = String::new();
    loop {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "the process ended before it was ready");
        if let Some(rest) = line.trim().strip_prefix(start) {
            return rest.to_owned();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// A running worker. It is killed when this is dropped.
pub struct Worker {
    child: Child,
    _stdout: BufReader<ChildStdout>,
    _dir: tempfile::TempDir,
}

impl Drop for Worker {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// The binary on a data directory, without what the caller's environment says of others.
fn attune(data: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_attune"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ATTUNE_")) {
        command.env_remove(name);
    }
    command.env("ATTUNE_DATA_DIR", data);
    // Of the S3 server that some tests start.
    command
        .env("AWS_ACCESS_KEY_ID", s3::USER.0)
        .env("AWS_SECRET_ACCESS_KEY", s3::USER.1)
        .env("AWS_REGION", "us-east-1");
    command
}

#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    url: String,
    key: String,
}

/// A status and a body.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Value,
}

impl Client {
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url)).bearer_auth(&self.key)
    }

    /// The same without a key.
    pub fn anonymous(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url))
    }

    pub async fn get(&self, path: &str) -> Answer {
        answer(self.request(Method::GET, path)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        answer(self.request(Method::POST, path).json(body)).await
    }

    /// The same with an idempotency key.
    pub async fn post_once(&self, key: &str, path: &str, body: &Value) -> Answer {
        answer(self.request(Method::POST, path).header("idempotency-key", key).json(body)).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        answer(self.request(Method::DELETE, path)).await
    }

    /// Uploads a training file; the answer as it comes.
    pub async fn upload(&self, content: impl Into<Vec<u8>>) -> Answer {
        let file = multipart::Part::bytes(content.into()).file_name("rows.jsonl");
        let form = multipart::Form::new().text("purpose", "fine-tune").part("file", file);
        answer(self.request(Method::POST, "/v1/files").multipart(form)).await
    }

    /// Uploads rows that are fine and gives the file's id.
    pub async fn file(&self, rows: usize) -> String {
        self.upload(chat_rows(rows)).await.ok()["id"].as_str().unwrap().to_owned()
    }

    /// A short job on `file`, followed to its end; the job as it is then.
    pub async fn trained(&self, file: &str) -> Value {
        let body = json!({
            "model": BASE, "training_file": file, "suffix": "test", "adapter": {"type": "lora", "r": 4, "alpha": 12},
            "training": {"max_steps": 2, "checkpoint_every": 1, "learning_rate": 0.01},
        });
        let job = self.post("/v1/fine_tuning/jobs", &body).await.ok();
        self.end_of(job["id"].as_str().unwrap()).await
    }

    /// Follows a job's stream of events to its end; the job as it is then.
    pub async fn end_of(&self, job: &str) -> Value {
        self.events(job, None).await;
        self.get(&format!("/v1/fine_tuning/jobs/{job}")).await.ok()
    }

    /// Asks for a job until it has a status: `paused` ends no stream that could be waited on.
    pub async fn until(&self, job: &str, status: &str) {
        loop {
            let now = self.get(&format!("/v1/fine_tuning/jobs/{job}")).await.ok();
            if now["status"] == status {
                return;
            }
            let ended = matches!(now["status"].as_str(), Some("succeeded" | "failed" | "cancelled"));
            assert!(!ended, "waited for {status}: {now}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// The events of a job's stream, `(id, data)`, until it ends.
    pub async fn events(&self, job: &str, last: Option<&str>) -> Vec<(String, Value)> {
        let path = format!("/v1/fine_tuning/jobs/{job}/events");
        let mut request = self.request(Method::GET, &path).header("accept", "text/event-stream");
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let text = request.send().await.unwrap().error_for_status().unwrap().text().await.unwrap();
        let field = |block: &str, name: &str| {
            block.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
        };
        let blocks = text.split("\n\n").filter_map(|block| Some((field(block, "id:")?, field(block, "data:")?)));
        blocks.map(|(id, data)| (id, serde_json::from_str(&data).unwrap())).collect()
    }

    /// The chunks of a stream, which must end with `[DONE]`.
    pub async fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let response: Response = self.request(Method::POST, path).json(body).send().await.unwrap();
        let text = response.error_for_status().unwrap().text().await.unwrap();
        let mut data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{text}");
        data.into_iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect()
    }
}

/// Sends a request. Every answer must carry a request id, and every error the whole envelope.
pub async fn answer(request: RequestBuilder) -> Answer {
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    assert!(response.headers().contains_key("x-request-id"), "no x-request-id on {}", response.url());
    let retry = response.headers().contains_key("retry-after");
    assert_eq!(retry, matches!(status, 429 | 503), "retry-after on {status}");
    let text = response.text().await.unwrap();
    let body: Value = serde_json::from_str(&text).unwrap_or(Value::String(text));
    if status >= 400 {
        let error = body["error"].as_object().unwrap_or_else(|| panic!("{status} without an envelope: {body}"));
        let keys: Vec<&str> = error.keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"], "{body}");
    }
    Answer { status, body }
}

impl Answer {
    /// The body of a success.
    #[track_caller]
    pub fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.body
    }

    /// Checks an error by its status, code and param; gives its message.
    #[track_caller]
    pub fn error(self, status: u16, code: &str, param: Option<&str>) -> String {
        let error = &self.body["error"];
        let found = (self.status, error["code"].as_str(), error["param"].as_str());
        assert_eq!(found, (status, Some(code), param), "{}", self.body);
        error["message"].as_str().unwrap().to_owned()
    }
}

/// Chat rows of uneven lengths.
pub fn chat_rows(n: usize) -> String {
    let row = |i: usize| {
        let question = format!("Question {i}{}", " and more".repeat(i % 3));
        json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": format!("Answer {i}")}]})
    };
    (0..n).map(|i| format!("{}\n", row(i))).collect()
}

//! Readers of streams who stop reading: sequences run to their ends without them, and the text waits.

use std::{fs, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

use super::tools::with_context;
use crate::support::server::{BASE, KEY, Server};

const CHAT: &str = "/v1/chat/completions";
const TOKENS: usize = 2500;

/// Some megabytes: each token brings twenty others, more than the sockets' buffers hold.
fn body(seed: usize) -> Value {
    json!({"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": TOKENS, "seed": seed,
           "ignore_eos": true, "logprobs": true, "top_logprobs": 20})
}

/// Asks for a stream over a connection that takes little at once, and reads its first bytes.
async fn begin(server: &Server, seed: usize) -> TcpStream {
    let mut body = body(seed);
    body["stream"] = json!(true);
    let body = body.to_string();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(server.url.strip_prefix("http://").unwrap().parse().unwrap()).await.unwrap();
    // HTTP/1.0 has no chunks: what follows the headers is the stream.
    let head = format!(
        "POST {CHAT} HTTP/1.0\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    let mut first = [0; 15];
    stream.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.0 200 OK");
    stream
}

fn resident_bytes(server: &Server) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.process())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[tokio::test]
async fn who_does_not_read_holds_nobody_up_and_loses_nothing() {
    let server = with_context(&["--max-batch", "3"], 4096);
    let client = server.client();
    let short = json!({"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "seed": 9});
    let alone = client.post(CHAT, &short).await.ok()["choices"].clone();
    let before = resident_bytes(&server);
    let mut readers = Vec::new();
    for seed in 0..3 {
        readers.push(begin(&server, seed).await);
    }
    // All three places are taken until those who do not read are done.
    let asked = tokio::time::timeout(Duration::from_secs(300), client.post(CHAT, &short));
    assert_eq!(asked.await.unwrap().ok()["choices"], alone);
    let grown = resident_bytes(&server).saturating_sub(before);
    assert!(grown < 96 << 20, "{grown} bytes for what three readers left");
    // One goes away; the others read on and find all of it.
    readers.truncate(2);
    for (seed, mut reader) in readers.into_iter().enumerate() {
        let mut text = String::new();
        reader.read_to_string(&mut text).await.unwrap();
        let mut data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"));
        let chunks: Vec<Value> = data.iter().map(|data| serde_json::from_str(data).unwrap()).collect();
        let choices: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
        let scored = choices.iter().filter(|choice| choice["logprobs"]["content"][0].is_object()).count();
        assert_eq!((scored, &choices.last().unwrap()["finish_reason"]), (TOKENS, &json!("length")));
        let said: String = choices.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        let whole = client.post(CHAT, &body(seed)).await.ok();
        assert_eq!(whole["choices"][0]["message"]["content"], said);
    }
}

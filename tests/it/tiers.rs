//! Where adapters are, as the API says it: pins, mixtures, ten thousand names, SIGKILL in the middle of a download.

use std::{path::Path, time::Duration};

use serde_json::{Value, json};

use crate::support::{
    s3::Store,
    server::{BASE, Client, Server},
};

const CHAT: &str = "/v1/chat/completions";

fn chat(model: &Value) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "Question 1"}], "max_tokens": 8, "temperature": 0,
           "ignore_eos": true, "logprobs": true})
}

async fn trained(client: &Client, adapter: Value, seed: u64) -> Value {
    let file = client.file(6).await;
    let body = json!({"model": BASE, "training_file": file, "suffix": "tiers", "adapter": adapter, "seed": seed,
                      "training": {"max_steps": 2, "learning_rate": 0.05}});
    let job = client.post("/v1/fine_tuning/jobs", &body).await.ok();
    let ended = client.end_of(job["id"].as_str().unwrap()).await;
    assert_eq!(ended["status"], "succeeded", "{ended}");
    ended["fine_tuned_model"].clone()
}

async fn adapter(client: &Client, model: &Value) -> Value {
    client.get(&format!("/v1/adapters/{}", model.as_str().unwrap())).await.ok()
}

fn lora(r: u64) -> Value {
    json!({"type": "lora", "r": r, "alpha": r + 2})
}

#[tokio::test]
async fn a_pinned_adapter_is_loaded_at_once_and_again_after_a_restart() {
    let mut server = Server::with(&["--adapter-cache", "10000000"]);
    let client = server.client();
    let model = trained(&client, lora(4), 1).await;
    // What was trained just now is in memory already.
    server.kill_and_restart();
    let client = server.client();
    let before = adapter(&client, &model).await;
    assert_eq!(
        (&before["tier"], &before["pinned"], &before["resident"]),
        (&json!("store"), &json!(false), &json!(false))
    );
    let path = format!("/v1/adapters/{}/pin", model.as_str().unwrap());
    assert_eq!(client.post(&path, &json!({})).await.ok()["pinned"], true);
    let in_memory = async |client: &Client| loop {
        let now = adapter(client, &model).await;
        if now["tier"] == "memory" {
            return now;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let now = in_memory(&client).await;
    assert_eq!((&now["hits"], &now["pinned"], &now["resident_bytes"]), (&json!(0), &json!(true), &now["bytes"]));
    assert!(now["load_seconds"].as_f64().unwrap() > 0.0);
    client.post(CHAT, &chat(&model)).await.ok();
    assert_eq!(adapter(&client, &model).await["hits"], 1);
    server.kill_and_restart();
    let client = server.client();
    assert_eq!(in_memory(&client).await["pinned"], true);
    assert_eq!(client.delete(&path).await.ok()["pinned"], false);
    assert_eq!(client.delete(&path).await.ok()["pinned"], false, "twice is once");
    client.post("/v1/adapters/adapter-none/pin", &json!({})).await.error(404, "not_found", Some("id"));

    // Half of the memory is for pins.
    let bytes = now["bytes"].as_u64().unwrap();
    let small = Server::with(&["--adapter-budget", &(2 * bytes - 2).to_string()]);
    let client = small.client();
    let model = trained(&client, lora(4), 1).await;
    let path = format!("/v1/adapters/{}/pin", model.as_str().unwrap());
    let message = client.post(&path, &json!({})).await.error(409, "pins_full", Some("adapter_id"));
    assert!(message.contains(&bytes.to_string()), "{message}");
    assert_eq!(adapter(&client, &model).await["pinned"], false);
}

#[tokio::test]
async fn adapters_are_mixed_for_one_request() {
    let server = Server::start();
    let client = server.client();
    let (a, b) = (trained(&client, lora(3), 1).await, trained(&client, lora(5), 2).await);
    let ia3 = trained(&client, json!({"type": "ia3"}), 3).await;
    let with = |adapters: Value| {
        let mut body = chat(&json!(BASE));
        body["adapters"] = adapters;
        body
    };
    let first = |answer: &Value| answer["choices"][0]["logprobs"]["content"][0]["logprob"].as_f64().unwrap();
    let alone = client.post(CHAT, &chat(&a)).await.ok();
    let base = client.post(CHAT, &chat(&json!(BASE))).await.ok();
    let one = client.post(CHAT, &with(json!([{"model": a}]))).await.ok();
    assert!((first(&one) - first(&alone)).abs() < 1e-3 && first(&one) != first(&base), "{one}");
    let none = client.post(CHAT, &with(json!([{"model": a, "weight": 0}]))).await.ok();
    assert!((first(&none) - first(&base)).abs() < 1e-3);
    let both = client.post(CHAT, &with(json!([{"model": a, "weight": 0.5}, {"model": b, "weight": -2}]))).await.ok();
    assert_eq!(both["model"], BASE);
    assert!([&alone, &base, &one].iter().all(|other| first(other) != first(&both)));
    assert_ne!(both["system_fingerprint"], one["system_fingerprint"]);
    let complete = json!({"model": BASE, "prompt": "a", "max_tokens": 2, "adapters": [{"model": a}, {"model": b}]});
    client.post("/v1/completions", &complete).await.ok();
    let vector = async |adapters: Value| {
        let body = json!({"model": BASE, "input": "a", "adapters": adapters});
        client.post("/v1/embeddings", &body).await.ok()["data"][0]["embedding"].clone()
    };
    assert_ne!(vector(json!([{"model": a}])).await, vector(Value::Null).await);
    for (adapters, status, code, param) in [
        (json!([]), 400, "out_of_range", "adapters"),
        (json!(vec![json!({"model": a}); 9]), 400, "out_of_range", "adapters"),
        (json!([{"model": a}, {"model": ia3}]), 400, "not_mixable", "adapters.1.model"),
        (json!([{"model": "ft:none"}]), 404, "model_not_found", "adapters.0.model"),
        (json!([{"model": BASE}]), 400, "not_an_adapter", "adapters.0.model"),
        (json!([{"model": a}, {"model": a, "weight": 2}]), 400, "given_twice", "adapters.1.model"),
        (json!([{"model": a, "weight": 101}]), 400, "out_of_range", "adapters.0.weight"),
        (json!([{"model": a, "weight": "1"}]), 400, "invalid_type", "adapters[0].weight"),
    ] {
        client.post(CHAT, &with(adapters)).await.error(status, code, Some(param));
    }
    let mut tuned = chat(&a);
    tuned["adapters"] = json!([{"model": b}]);
    client.post(CHAT, &tuned).await.error(400, "invalid_combination", Some("adapters"));
    let other = server.client_with(&server.create_key("other", "all"));
    other.post(CHAT, &with(json!([{"model": a}]))).await.error(404, "model_not_found", Some("adapters.0.model"));
}

/// Bytes that a process has in memory.
fn resident(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// The bar of ten thousand registered adapters: 20 MB.
#[tokio::test]
async fn ten_thousand_adapters_cost_little_memory() {
    const N: usize = 10_000;
    let server = Server::start();
    let client = server.client();
    let model = trained(&client, lora(4), 1).await;
    let used = async || {
        client.post(CHAT, &chat(&model)).await.ok();
        client.get("/v1/adapters?limit=100").await.ok()
    };
    // As often as below, so that what every thread's requests take once is there.
    for _ in 0..100 {
        used().await;
    }
    let before = resident(server.process());
    let url = format!("sqlite:{}", server.data().join("attune.db").display());
    sqlx::any::install_default_drivers();
    let raw = sqlx::any::AnyPoolOptions::new().max_connections(1).connect(&url).await.unwrap();
    // As many as are registered, all with files of their own, which are not there.
    let sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000) \
               INSERT INTO adapters (id, project, model, parent, method, generation, bytes, created_at, virtual_tokens) \
               SELECT 'adapter-' || i, project, 'ft:tiny:default:many:' || i, parent, method, \
               printf('%064x', i), bytes, created_at, virtual_tokens FROM adapters, n WHERE model = $1";
    sqlx::query(sql).bind(model.as_str().unwrap()).execute(&raw).await.unwrap();
    let mut after = None;
    let mut seen = 0;
    loop {
        let path = after
            .as_ref()
            .map_or_else(|| "/v1/adapters?limit=100".to_owned(), |id| format!("/v1/adapters?limit=100&after={id}"));
        let page = client.get(&path).await.ok();
        seen += page["data"].as_array().unwrap().len();
        if page["has_more"] == false {
            break;
        }
        after = page["last_id"].as_str().map(str::to_owned);
    }
    assert_eq!(seen, N + 2);
    for i in (1..=N).step_by(5) {
        let missing = chat(&json!(format!("ft:tiny:default:many:{i}")));
        client.post(CHAT, &missing).await.error(409, "adapter_unusable", None);
    }
    used().await;
    let added = resident(server.process()).saturating_sub(before);
    println!("{added} bytes for {N} adapters");
    assert!(added <= 20_000_000, "{added} bytes");
    // All names at once are no longer what registered adapters cost, but what this list does: the base, the trained one
    // and its last checkpoint are in it too.
    let models = client.get("/v1/models").await.ok();
    assert_eq!(models["data"].as_array().unwrap().len(), N + 3);
}

/// What the cache has of adapters, and of halves.
fn cached(data: &Path) -> (usize, usize) {
    let names: Vec<String> = std::fs::read_dir(data.join("adapters"))
        .map(|all| all.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect())
        .unwrap_or_default();
    let halves = names.iter().filter(|name| name.ends_with(".partial")).count();
    (names.iter().filter(|name| name.len() == 64).count(), halves)
}

#[tokio::test]
async fn a_kill_in_the_middle_of_a_download_leaves_nothing_half() {
    let store = Store::start().await;
    let arguments = ["--blob-store", "s3://attune-test/kill", "--s3-endpoint", &store.endpoint];
    let mut server = Server::with(&arguments);
    let model = trained(&server.client(), lora(8), 1).await;
    server.kill_and_restart();
    let expected = server.client().post(CHAT, &chat(&model)).await.ok();
    assert_eq!(cached(server.data()), (1, 0));
    let mut halves = 0;
    for _ in 0..3 {
        server.kill();
        std::fs::remove_dir_all(server.data().join("adapters")).unwrap();
        server.restart();
        store.drip(true);
        let (client, body) = (server.client(), chat(&model));
        let asked = tokio::spawn(async move { client.request(reqwest::Method::POST, CHAT).json(&body).send().await });
        while cached(server.data()).1 == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        halves += 1;
        server.kill();
        assert!(asked.await.unwrap().is_err(), "the connection broke");
        assert_eq!(cached(server.data()), (0, 1), "killed in the middle");
        store.drip(false);
        server.restart();
        assert_eq!(cached(server.data()), (0, 0), "swept at the start");
        let again = server.client().post(CHAT, &chat(&model)).await.ok();
        assert_eq!(again["choices"], expected["choices"]);
    }
    assert_eq!(halves, 3);
    // And without the store.
    server.kill_and_restart();
    store.cut();
    let away = server.client().post(CHAT, &chat(&model)).await.ok();
    assert_eq!(away["choices"], expected["choices"]);
    assert_eq!(adapter(&server.client(), &model).await["tier"], "memory");
}

//! Several processes on one database: the command line beside a busy server, and workers beside a server.

use serde_json::json;

use crate::support::{
    postgres::Postgres,
    server::{BASE, KEY, Server},
};

#[tokio::test]
async fn a_worker_trains_what_a_server_took() {
    let Some(postgres) = Postgres::start().await else { return };
    let blobs = tempfile::tempdir().unwrap();
    let blobs = format!("file:{}", blobs.path().display());
    let shared = ["--database-url", &postgres.url, "--blob-store", &blobs];
    let server = Server::with(&[&shared[..], &["--workers", "0"]].concat());
    let client = server.client();
    let file = client.file(8).await;
    let body = json!({"model": BASE, "training_file": file, "suffix": "far", "training": {"max_steps": 3}});
    let job = client.post("/v1/fine_tuning/jobs", &body).await.ok();
    let id = job["id"].as_str().unwrap();
    // A training of three steps takes a tenth of this.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    let waiting = client.get(&format!("/v1/fine_tuning/jobs/{id}")).await.ok();
    assert_eq!((&waiting["status"], &waiting["started_at"]), (&json!("queued"), &json!(null)), "nobody trains yet");

    let _worker = server.worker(&shared);
    let ended = tokio::time::timeout(std::time::Duration::from_secs(100), client.end_of(id)).await;
    let ended = ended.expect("the worker takes the job");
    assert_eq!(ended["status"], "succeeded", "{ended}");
    let chat = json!({
        "model": ended["fine_tuned_model"], "messages": [{"role": "user", "content": "Question 1"}], "max_tokens": 4,
    });
    let answer = client.post("/v1/chat/completions", &chat).await.ok();
    assert_eq!(answer["model"], ended["fine_tuned_model"]);
}

#[test]
fn a_worker_says_what_it_must_share() {
    let server = Server::start();
    let refused = server.command(&["worker"]).unwrap_err();
    assert!(refused.contains("--database-url") && refused.contains("PostgreSQL"), "{refused}");
    let refused = server.command(&["worker", "--database-url", "postgres://nobody@localhost/none"]).unwrap_err();
    assert!(refused.contains("--blob-store"), "{refused}");
    assert!(server.command(&["worker", "--workers", "0"]).unwrap_err().contains("0 is not in 1..=64"));
    let help = server.command(&["--help"]).unwrap();
    assert!(help.contains("worker") && help.contains("Train queued jobs in a process of its own"), "{help}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_made_and_revoked_beside_a_busy_server() {
    let server = Server::start();
    let client = server.client();
    let file = client.file(4).await;
    let busy = tokio::spawn({
        let client = client.clone();
        async move {
            loop {
                let body = json!({"model": BASE, "training_file": file, "training": {"max_steps": 2}});
                let job = client.post("/v1/fine_tuning/jobs", &body).await.ok();
                client.post(&format!("/v1/fine_tuning/jobs/{}/cancel", job["id"].as_str().unwrap()), &json!({})).await;
            }
        }
    });
    for n in 0..8 {
        let key = tokio::task::block_in_place(|| server.create_key("team", "read"));
        let team = server.client_with(&key);
        team.get("/v1/files").await.ok();
        let list = tokio::task::block_in_place(|| server.command(&["keys", "list"]).unwrap());
        assert_eq!(list.lines().count(), n + 2, "the bootstrap key too: {list}");
        assert!(!list.contains(&key), "a key is shown once");
        let line = list.lines().find(|line| line.contains("\tteam\tread\t") && line.ends_with("\tactive")).unwrap();
        let id = line.split('\t').next().unwrap();
        let revoked = tokio::task::block_in_place(|| server.command(&["keys", "revoke", id]).unwrap());
        assert!(revoked.starts_with(id) && revoked.contains("\trevoked 20"), "{revoked}");
        team.get("/v1/files").await.error(401, "invalid_api_key", None);
    }
    assert!(!busy.is_finished(), "the server was busy all the time");
    busy.abort();
    client.get("/v1/files").await.ok();
    let unknown = server.command(&["keys", "revoke", "key-none"]).unwrap_err();
    assert!(unknown.contains("no key with the id key-none"), "{unknown}");
}

#[tokio::test]
async fn a_revoked_bootstrap_key_does_not_come_back() {
    let mut server = Server::start();
    let list = server.command(&["keys", "list"]).unwrap();
    server.command(&["keys", "revoke", list.split('\t').next().unwrap()]).unwrap();
    server.client().get("/v1/files").await.error(401, "invalid_api_key", None);
    server.kill();
    let model = server.model_argument();
    let refused = server.command(&["serve", "--listen", "127.0.0.1:0", "--model", &model]).unwrap_err();
    assert!(refused.contains("the key in ATTUNE_API_KEY was revoked") && !refused.contains(KEY), "{refused}");
}

#[test]
fn a_data_directory_may_have_any_name() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a b%20c#d?e");
    server.command(&["migrate", "--data-dir", data.to_str().unwrap()]).unwrap();
    assert!(data.join("attune.db").is_file());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing beside it");
}

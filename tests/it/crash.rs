//! SIGKILL in the middle of a job: after a restart it goes on from its last checkpoint, and nothing in its result
//! tells that it was interrupted. And faults that pass by themselves.

use serde_json::{Value, json};

use crate::support::server::{BASE, Client, Server};

const STEPS: usize = 40;

async fn start_job(client: &Client) -> String {
    let file = client.file(24).await;
    let body = json!({
        "model": BASE, "training_file": file, "suffix": "crash", "seed": 7,
        "adapter": {"type": "lora", "r": 4, "alpha": 12, "dropout": 0.3},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 5}}},
        "training": {"max_steps": STEPS, "checkpoint_every": 4, "learning_rate": 0.01, "validation_split": 0.1},
    });
    client.post("/v1/fine_tuning/jobs", &body).await.ok()["id"].as_str().unwrap().to_owned()
}

/// Every step's loss and gradient norm, in the order of the events.
fn losses(events: &[(String, Value)]) -> Vec<(Value, Value, Value)> {
    let metrics = events.iter().map(|(_, event)| event).filter(|event| event["type"] == "metrics");
    let of = |data: &Value| (data["step"].clone(), data["train_loss"].clone(), data["grad_norm"].clone());
    metrics.map(|event| of(&event["data"])).collect()
}

/// The newest step that has an event.
async fn step(client: &Client, job: &str) -> u64 {
    let events = client.get(&format!("/v1/fine_tuning/jobs/{job}/events?limit=5")).await.ok();
    let newest = events["data"].as_array().unwrap().iter().find(|event| event["type"] == "metrics").cloned();
    newest.map_or(0, |event| event["data"]["step"].as_u64().unwrap())
}

/// The adapter's identity: a hash of its bytes.
async fn generation(client: &Client, job: &Value) -> Value {
    let model = job["fine_tuned_model"].as_str().unwrap_or_else(|| panic!("no model: {job}"));
    client.get(&format!("/v1/models/{model}")).await.ok()["adapter_generation"].clone()
}

#[tokio::test]
async fn a_killed_job_ends_with_the_same_bytes() {
    let quiet = Server::start();
    let client = quiet.client();
    let job = start_job(&client).await;
    let events = client.events(&job, None).await;
    let expected = losses(&events);
    assert_eq!(expected.len(), STEPS);
    let whole = generation(&client, &client.end_of(&job).await).await;

    let mut server = Server::start();
    let job = start_job(&server.client()).await;
    for at in [3, 13, 26] {
        while step(&server.client(), &job).await < at {
            tokio::task::yield_now().await;
        }
        server.kill_and_restart();
    }
    let client = server.client();
    let ended = client.end_of(&job).await;
    let events = client.events(&job, None).await;
    assert_eq!(losses(&events), expected);
    assert_eq!(generation(&client, &ended).await, whole);
    let resumed = |(_, event): &&(String, Value)| event["message"].as_str().unwrap().starts_with("Going on from");
    assert_eq!(events.iter().filter(resumed).count(), 3, "{events:#?}");
    let numbers: Vec<u64> = events.iter().map(|(id, _)| id.parse().unwrap()).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>(), "events without gaps");
}

#[tokio::test]
async fn a_passing_fault_costs_a_moment() {
    let server = Server::start();
    let client = server.client();
    // A file where the folder should be: no checkpoint can be written, not even by root.
    let obstacle = server.data().join("blobs/checkpoints");
    std::fs::write(&obstacle, "").unwrap();
    let job = start_job(&client).await;
    let path = format!("/v1/fine_tuning/jobs/{job}/events?limit=100");
    let faults = async || {
        let events = client.get(&path).await.ok();
        let is_fault = |event: &&Value| event["message"].as_str().unwrap().starts_with("A passing fault of the server");
        events["data"].as_array().unwrap().iter().filter(is_fault).count()
    };
    let since = std::time::Instant::now();
    while faults().await < 3 {
        assert!(since.elapsed().as_secs() < 60, "three attempts take less than one lease");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    std::fs::remove_file(&obstacle).unwrap();
    let since = std::time::Instant::now();
    let ended = client.end_of(&job).await;
    assert_eq!(ended["status"], "succeeded", "{ended}");
    assert!(since.elapsed().as_secs() < 60, "a lease of 90 s was waited for: {:?}", since.elapsed());
}

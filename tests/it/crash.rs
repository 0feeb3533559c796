//! SIGKILL in the middle of a job: after a restart it goes on from its last checkpoint, and nothing in its result
//! tells that it was interrupted. And faults that pass by themselves.

use std::{path::PathBuf, time::Duration};

use serde_json::{Value, json};

use crate::support::{
    server::{BASE, Client, Server},
    tiny::Random,
};

const STEPS: usize = 40;

async fn start_job(client: &Client) -> String {
    start_job_of(client, STEPS).await
}

/// Dropout, accumulation, and epochs of six steps, in whose middle checkpoints fall.
async fn start_job_of(client: &Client, steps: usize) -> String {
    let file = client.file(24).await;
    let body = json!({
        "model": BASE, "training_file": file, "suffix": "crash", "seed": 7,
        "adapter": {"type": "lora", "r": 4, "alpha": 12, "dropout": 0.3},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1000, "batch_size": 2}}},
        "training": {"max_steps": steps, "checkpoint_every": 4, "learning_rate": 0.01, "validation_split": 0.1,
                     "grad_accumulation": 2, "eval_every": 50},
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

/// A hundred kills at random moments: before a claim, in the middle of a step, while a checkpoint is written.
#[tokio::test]
async fn a_hundred_kills_leave_no_trace() {
    const KILLS: usize = 100;
    const STEPS: usize = 1200;
    let quiet = Server::start();
    let job = start_job_of(&quiet.client(), STEPS).await;
    let expected = losses(&quiet.client().events(&job, None).await);
    assert_eq!(expected.len(), STEPS);
    let whole = generation(&quiet.client(), &quiet.client().end_of(&job).await).await;
    drop(quiet);

    let mut random = Random(17);
    let mut server = Server::start();
    let job = start_job_of(&server.client(), STEPS).await;
    for kill in 0..KILLS {
        // Three attempts in a row without a step would fail the job: every other one lives to see some.
        if kill % 2 == 1 {
            let client = server.client();
            let target = step(&client, &job).await + 1 + random.below(6) as u64;
            while step(&client, &job).await < target {
                let now = client.get(&format!("/v1/fine_tuning/jobs/{job}")).await.ok();
                assert!(matches!(now["status"].as_str(), Some("queued" | "running")), "before kill {kill}: {now}");
            }
        }
        tokio::time::sleep(Duration::from_micros(random.below(40_000) as u64)).await;
        server.kill_and_restart();
    }
    let client = server.client();
    assert!(step(&client, &job).await < STEPS as u64, "the job ended before the last kill");
    let ended = client.end_of(&job).await;
    let events = client.events(&job, None).await;
    assert_eq!(losses(&events), expected);
    assert_eq!(generation(&client, &ended).await, whole);
    let resumed: Vec<u64> = events.iter().filter_map(|(_, event)| resumed_from(event)).collect();
    assert!(resumed.is_sorted() && resumed.len() > KILLS / 3, "{resumed:?}");
    assert!(
        resumed.iter().filter(|step| **step % 6 != 0).count() > KILLS / 6,
        "never in an epoch's middle: {resumed:?}"
    );
}

/// The step of the checkpoint that an attempt went on from.
fn resumed_from(event: &Value) -> Option<u64> {
    let message = event["message"].as_str()?.strip_prefix("Going on from the checkpoint of step ")?;
    Some(message.parse().unwrap())
}

/// The folders of all checkpoints from a step on. What a killed attempt was writing may be among them.
fn checkpoints_from(server: &Server, job: &str, step: u64) -> Vec<PathBuf> {
    let inside = |dir: PathBuf| std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let attempts = inside(server.data().join("blobs/checkpoints").join(job));
    let is_late = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().parse::<u64>().unwrap() >= step;
    attempts.flat_map(inside).filter(is_late).collect()
}

/// One damaged part is enough: the checkpoint before is used, an event says so, and the end is the same.
#[tokio::test]
async fn a_damaged_checkpoint_is_passed_over() {
    let quiet = Server::start();
    let job = start_job(&quiet.client()).await;
    let expected = losses(&quiet.client().events(&job, None).await);
    let whole = generation(&quiet.client(), &quiet.client().end_of(&job).await).await;
    drop(quiet);

    let flip = |bytes: &mut Vec<u8>| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    };
    let truncate = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() - 7);
    type Damage = fn(&mut Vec<u8>);
    let damages: [(&str, Damage); 4] = [
        ("trainer.safetensors", flip),
        ("trainer.json", truncate),
        ("adapter_model.safetensors", truncate),
        ("adapter_config.json", flip),
    ];
    let mut server = Server::start();
    let job = start_job(&server.client()).await;
    for (i, (name, damage)) in damages.into_iter().enumerate() {
        let client = server.client();
        while step(&client, &job).await < 9 * (i as u64 + 1) {
            tokio::task::yield_now().await;
        }
        let newest = client.get(&format!("/v1/fine_tuning/jobs/{job}/checkpoints")).await.ok();
        server.kill();
        let newest = newest["data"][0]["step_number"].as_u64().unwrap();
        for path in checkpoints_from(&server, &job, newest).iter().map(|folder| folder.join(name)) {
            let Ok(mut bytes) = std::fs::read(&path) else { continue };
            damage(&mut bytes);
            std::fs::write(&path, bytes).unwrap();
        }
        server.restart();
    }
    let client = server.client();
    let ended = client.end_of(&job).await;
    let events = client.events(&job, None).await;
    assert_eq!(losses(&events), expected);
    assert_eq!(generation(&client, &ended).await, whole);
    let messages: Vec<&str> = events.iter().filter_map(|(_, event)| event["message"].as_str()).collect();
    for (name, _) in damages {
        let is_it = |message: &&str| message.ends_with(&format!("is not used: {name} is damaged"));
        let at = messages.iter().position(is_it).unwrap_or_else(|| panic!("no event says {name}: {messages:#?}"));
        let rest = messages[at..].iter().find(|message| !message.contains("is not used"));
        assert!(rest.unwrap().starts_with("Going on from the checkpoint of step "), "{rest:?}");
    }
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

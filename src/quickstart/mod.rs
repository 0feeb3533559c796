//! `attune quickstart`: the main job on a real model, through the API as any client would do it; then it keeps serving.

mod client;
mod score;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::{api::serve, app, config::Config, outbound};
use client::Client;
use score::{Question, held_out};

/// The sample dataset is part of the program: there is nothing to find on the user's disk.
const TRAINING: &str = include_str!("../../samples/support.jsonl");
const FILENAME: &str = "support.jsonl";

/// Questions whose answers are shown, and those that are scored.
const SHOWN: usize = 3;
const SCORED: usize = 10;

/// Runs the job and serves until it is stopped.
pub async fn run(config: &Config) -> anyhow::Result<()> {
    ensure!(config.workers > 0, "--workers is 0, below 1: the quickstart trains in this process");
    let base = match config.node.models.first() {
        Some(model) => model.split('=').next().unwrap_or(outbound::BUILT_IN).to_owned(),
        None => outbound::BUILT_IN.to_owned(),
    };
    println!("loading {base} (the first run fetches it) …");
    let running = app::start(config).await?;
    let address = reachable(running.address);
    let key = match (&config.api_key, &running.key_file) {
        (Some(key), _) => key.clone(),
        (None, Some(path)) => {
            std::fs::read_to_string(path).with_context(|| path.display().to_string())?.trim().to_owned()
        }
        (None, None) => bail!("this data directory has keys already: put one into ATTUNE_API_KEY"),
    };
    println!("listening on http://{address}");
    let client = Client::new(&format!("http://{address}"), &key)?;
    tokio::select! {
        done = main_job(&client, &base) => {
            let model = done?;
            println!("\n{}", how_to_repeat(&format!("http://{address}"), &model, running.key_file.as_deref()));
            println!("Ctrl-C to stop");
            serve::stop_signal().await?;
        }
        stopped = serve::stop_signal() => stopped?,
    }
    running.stop().await;
    Ok(())
}

/// Where this machine reaches an address that means all of them.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = if address.ip().is_unspecified() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { address.ip() };
    SocketAddr::new(ip, address.port())
}

/// Upload, train, compare. Answers the tuned model's name.
async fn main_job(client: &Client, base: &str) -> anyhow::Result<String> {
    let file = match client.find_file(FILENAME, TRAINING.len()).await? {
        Some(file) => file,
        None => client.upload(FILENAME, TRAINING).await?,
    };
    println!("training file {file}");
    let request = json!({
        "model": base,
        "training_file": file,
        "suffix": "support",
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}},
        "adapter": {"type": "lora", "r": 8, "alpha": 16},
        "training": {"learning_rate": 2e-3},
    });
    let created = Instant::now();
    let job = client.post("/v1/fine_tuning/jobs", &request).await?;
    let id = job["id"].as_str().context("the job has no id")?.to_owned();
    println!("job {id}");
    let model = follow(client, &id).await?;
    let questions = held_out()?;
    client.first_token(&model, &questions[0].messages).await?;
    println!("{:.1} s from the job's creation to the first token of {model}", created.elapsed().as_secs_f64());
    compare(client, base, &model, &questions).await?;
    Ok(model)
}

/// Shows progress until the job ends.
async fn follow(client: &Client, id: &str) -> anyhow::Result<String> {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{bar:32} step {pos}/{len}  {msg}  {eta} left")?;
    bar.set_style(style);
    loop {
        let job = client.get(&format!("/v1/fine_tuning/jobs/{id}")).await?;
        let events = client.get(&format!("/v1/fine_tuning/jobs/{id}/events?limit=20")).await?;
        let newest = events["data"].as_array().and_then(|all| all.iter().find(|event| event["type"] == "metrics"));
        if let Some(metrics) = newest.map(|event| &event["data"]) {
            bar.set_length(metrics["total_steps"].as_u64().unwrap_or(0));
            bar.set_position(metrics["step"].as_u64().unwrap_or(0));
            let number = |name: &str| metrics[name].as_f64().unwrap_or(f64::NAN);
            bar.set_message(format!("loss {:.3}  {:.0} tokens/s", number("train_loss"), number("tokens_per_second")));
        }
        match job["status"].as_str() {
            Some("succeeded") => {
                bar.finish();
                return Ok(job["fine_tuned_model"].as_str().context("the job has no model")?.to_owned());
            }
            Some("failed" | "cancelled" | "paused") => {
                bar.abandon();
                bail!("the job is {}: {}", job["status"], job["error"]["message"]);
            }
            _ => tokio::time::sleep(std::time::Duration::from_millis(500)).await,
        }
    }
}

async fn compare(client: &Client, base: &str, tuned: &str, questions: &[Question]) -> anyhow::Result<()> {
    let mut right = [0; 2];
    for (i, question) in questions.iter().take(SCORED).enumerate() {
        let mut answers = Vec::new();
        for (model, right) in [base, tuned].into_iter().zip(&mut right) {
            let answer = client.answer(model, &question.messages).await?;
            *right += usize::from(question.is_right(&answer));
            answers.push(answer);
        }
        if i < SHOWN {
            println!("\n> {}\n  base:  {}\n  tuned: {}", question.text, one_line(&answers[0]), one_line(&answers[1]));
        }
    }
    let n = questions.len().min(SCORED);
    println!(
        "\nheld-out score (valid JSON, right category and priority): base {}/{n}, tuned {}/{n}",
        right[0], right[1]
    );
    Ok(())
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn how_to_repeat(url: &str, model: &str, key_file: Option<&std::path::Path>) -> String {
    let key = key_file.map_or("$ATTUNE_API_KEY".to_owned(), |path| format!("$(cat {})", path.display()));
    let body: Value = json!({"model": model, "messages": [
        {"role": "system", "content": score::SYSTEM}, {"role": "user", "content": "Where is my tent?"}]});
    format!(
        "Again with curl:\n  curl {url}/v1/models -H \"Authorization: Bearer {key}\"\n  \
         curl {url}/v1/chat/completions -H \"Authorization: Bearer {key}\" -H 'Content-Type: application/json' -d '{body}'\n\
         Or in Python (pip install openai):\n  from openai import OpenAI\n  \
         client = OpenAI(base_url=\"{url}/v1\", api_key=\"…\")\n  \
         client.chat.completions.create(model=\"{model}\", messages=[{{\"role\": \"user\", \"content\": \"Where is my tent?\"}}])"
    )
}

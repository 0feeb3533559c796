//! `attune keys`, and the keys that a server starts with.

use std::{fs, io::Write, os::unix::fs::OpenOptionsExt, path::PathBuf};

use anyhow::{Context as _, ensure};

use crate::{
    config::{Config, Keys},
    database,
    db::{Db, DbError},
    domain::{ApiKey, Scope, id},
    inference::sha256,
    jobs,
};

/// The project of the first key and of `ATTUNE_API_KEY`.
const FIRST_PROJECT: &str = "default";

/// `attune keys create`, `list` and `revoke`. They work beside running servers, which look a key up at each request.
pub async fn run(command: Keys) -> anyhow::Result<()> {
    match command {
        Keys::Create { project, scopes, database } => {
            println!("{}", create(&database::open(&database).await?, &project, scopes).await?);
        }
        Keys::List { database } => {
            for key in database::open(&database).await?.keys().await? {
                println!("{}", line(&key));
            }
        }
        Keys::Revoke { id, database } => {
            let revoked = database::open(&database).await?.revoke_key(&id).await;
            let key = revoked.map_err(|error| match error {
                DbError::NotFound => anyhow::anyhow!("there is no key with the id {id}"),
                error => error.into(),
            })?;
            println!("{}", line(&key));
        }
    }
    Ok(())
}

fn line(key: &ApiKey) -> String {
    let time = |unix: i64| chrono::DateTime::from_timestamp(unix, 0).unwrap_or_default().format("%FT%TZ").to_string();
    let scopes: Vec<_> = key.scopes.iter().map(|scope| format!("{scope:?}").to_lowercase()).collect();
    let state = key.revoked_at.map_or("active".to_owned(), |at| format!("revoked {}", time(at)));
    format!("{}\t{}\t{}\tcreated {}\t{state}", key.id, key.project, scopes.join(","), time(key.created_at))
}

/// Makes sure that there is a key: the configured one, or one of our own if there is none at all. Answers the file
/// that holds our own.
pub(crate) async fn first(db: &Db, config: &Config) -> anyhow::Result<Option<PathBuf>> {
    let path = config.node.database.data_dir.join("api_key");
    if let Some(key) = &config.api_key {
        let fits = (20..=200).contains(&key.len()) && key.chars().all(|c| c.is_ascii_graphic());
        ensure!(fits, "ATTUNE_API_KEY takes 20 to 200 printable characters");
        keep(db, key, FIRST_PROJECT, vec![Scope::All]).await?;
        let accepted = db.key(&sha256(key.as_bytes())).await;
        ensure!(!matches!(accepted, Err(DbError::NotFound)), "the key in ATTUNE_API_KEY was revoked: set another");
        accepted?;
    } else if !db.has_keys().await? {
        let key = create(db, FIRST_PROJECT, vec![Scope::All]).await?;
        let mut file = fs::OpenOptions::new();
        let file = file.create(true).write(true).truncate(true).mode(0o600).open(&path);
        let mut file = file.with_context(|| path.display().to_string())?;
        writeln!(file, "{key}")?;
        file.sync_all()?;
        eprintln!("a first API key was made: it is in {}", path.display());
    }
    Ok(path.exists().then_some(path))
}

/// A new key; only its hash is kept.
async fn create(db: &Db, project: &str, scopes: Vec<Scope>) -> anyhow::Result<String> {
    let fits = (1..=64).contains(&project.len());
    let plain = project.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
    ensure!(fits && plain, "a project takes 1 to 64 letters, digits, dashes and underscores");
    let key = format!("sk-{}", id::random(48));
    keep(db, &key, project, scopes).await?;
    Ok(key)
}

async fn keep(db: &Db, key: &str, project: &str, scopes: Vec<Scope>) -> anyhow::Result<()> {
    let record = ApiKey {
        id: id::new("key-"),
        project: project.to_owned(),
        sha256: sha256(key.as_bytes()),
        scopes,
        created_at: jobs::now(),
        revoked_at: None,
    };
    Ok(db.insert_key(&record).await?)
}

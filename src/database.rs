//! The database that the settings name.

use std::fs;

use anyhow::Context as _;

use crate::{config::DatabaseConfig, db::Db};

/// Whether it is the file of one process.
pub fn is_embedded(config: &DatabaseConfig) -> bool {
    config.database_url().starts_with("sqlite:")
}

/// With its tables up to date. Other processes may use it meanwhile.
pub async fn open(config: &DatabaseConfig) -> anyhow::Result<Db> {
    if is_embedded(config) {
        fs::create_dir_all(&config.data_dir)
            .with_context(|| format!("the data directory {}", config.data_dir.display()))?;
    }
    let db = Db::connect(&config.database_url()).await.context("the database")?;
    db.migrate().await?;
    Ok(db)
}

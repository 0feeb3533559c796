//! quickstart

/// stub
pub async fn run(config: &crate::config::Config) -> anyhow::Result<()> {
    crate::app::serve_until_stopped(config).await
}

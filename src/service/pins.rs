//! Adapters that stay at hand, whoever else is asked for.

use super::{Fault, Problem, Service};
use crate::{
    db::DbError,
    domain::{AdapterRecord, Caller},
    inference::AdapterRef,
};

impl Service {
    /// Pins an adapter and loads it; pinned ones may take half of the memory that adapters have.
    pub async fn pin_adapter(&self, caller: &Caller, name: &str) -> Result<AdapterRecord, Problem> {
        let record = self.adapter(&caller.project, name).await?;
        self.db.pin(caller, &record, self.engine.adapter_budget() / 2).await.map_err(|error| match error {
            DbError::Conflict(message) => Problem::new(Fault::Conflict, "pins_full", message).at("adapter_id"),
            error => error.into(),
        })?;
        self.refresh_pins().await?;
        Ok(record)
    }

    pub async fn unpin_adapter(&self, caller: &Caller, name: &str) -> Result<AdapterRecord, Problem> {
        let record = self.adapter(&caller.project, name).await?;
        self.db.unpin(caller, &record).await?;
        self.refresh_pins().await?;
        Ok(record)
    }

    /// Tells the engine what the database says: other processes pin too.
    pub async fn refresh_pins(&self) -> Result<(), Problem> {
        let pins = self.db.pins().await?;
        let known =
            pins.iter().filter_map(|record| Some((self.bases.get(&record.parent)?.clone(), AdapterRef::from(record))));
        self.engine.pin(&known.collect::<Vec<_>>());
        Ok(())
    }
}

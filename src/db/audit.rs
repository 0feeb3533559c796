//! The append-only log of changes: who, what, on what.

use super::{Db, DbError, Tx};

impl Db {
    /// In the transaction of the change itself. The actor is a key's id, a worker's name, or `operator` for the
    /// command line.
    pub(super) async fn audit(
        &self,
        tx: &mut Tx,
        actor: &str,
        project: &str,
        action: &str,
        subject: &str,
    ) -> Result<(), DbError> {
        let sql = self.sql("INSERT INTO audit (at, actor, project, action, subject) VALUES ({now}, $1, $2, $3, $4)");
        sqlx::query(sql).bind(actor).bind(project).bind(action).bind(subject).execute(&mut **tx).await?;
        Ok(())
    }
}

//! Names of the user's own for adapters: requests keep the name while the adapter behind it changes.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Fault, Problem, Service, fields::read};
use crate::{
    db::DbError,
    domain::{AliasRecord, Caller, Expected},
};

/// Characters of an alias.
const MAX_NAME: usize = 64;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    model: String,
    expected_generation: Option<String>,
}

impl Service {
    /// Points an alias at an adapter. With `expected_generation` it moves only from there; null: only if it is new.
    pub async fn move_alias(
        &self,
        caller: &Caller,
        name: &str,
        body: Map<String, Value>,
    ) -> Result<AliasRecord, Problem> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if !(1..=MAX_NAME).contains(&name.len()) || !name.chars().all(is_plain) {
            let message = format!("an alias takes 1 to {MAX_NAME} letters, digits, dots, dashes and underscores");
            return Err(Problem::invalid("alias", "invalid_name", message));
        }
        if self.bases.get(name).is_some() {
            let message = format!("{name} is a base");
            return Err(Problem::invalid("alias", "name_taken", message));
        }
        // Here null says something.
        let is_new = body.get("expected_generation") == Some(&Value::Null);
        let wanted: Wanted = read(body)?;
        let expected = match wanted.expected_generation {
            Some(generation) => Expected::Generation(generation),
            None if is_new => Expected::Absent,
            None => Expected::Anything,
        };
        let record = self.db.adapter(&caller.project, &wanted.model).await.map_err(|error| match error {
            DbError::NotFound => Problem::model_not_found(&wanted.model),
            error => error.into(),
        })?;
        match self.db.move_alias(caller, name, &record, &expected).await {
            Ok(()) => self.alias(&caller.project, name).await,
            Err(DbError::Conflict(message)) => {
                let now = match self.db.alias(&caller.project, name).await {
                    Ok(now) => format!("it points at {}", now.generation),
                    Err(DbError::NotFound) => "there is none".to_owned(),
                    Err(error) => return Err(error.into()),
                };
                let problem = Problem::new(Fault::Conflict, "alias_moved", format!("{message}: {now}"));
                Err(problem.at("expected_generation"))
            }
            Err(error) => Err(error.into()),
        }
    }

    pub async fn alias(&self, project: &str, name: &str) -> Result<AliasRecord, Problem> {
        self.db.alias(project, name).await.map_err(|error| of_alias(error, name))
    }

    pub async fn delete_alias(&self, caller: &Caller, name: &str) -> Result<(), Problem> {
        self.db.delete_alias(caller, name).await.map_err(|error| of_alias(error, name))
    }
}

fn of_alias(error: DbError, name: &str) -> Problem {
    match error {
        DbError::NotFound => Problem::not_found("alias", name),
        error => error.into(),
    }
}

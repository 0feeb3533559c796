//! The log of changes says who made them.

use attune::{
    db::Wish,
    domain::{ApiKey, Scope},
};
use sqlx::Row;

use super::{Store, a_file, a_job, a_publication, an_adapter, caller, on_both};

on_both!(every_change_has_its_actor);

async fn every_change_has_its_actor(store: Store) {
    let db = &store.db;
    let (me, job, file, adapter) = (caller("p", "key-me"), a_job(0), a_file("p"), an_adapter("p", "ft:a", None, "g"));
    db.insert_file("key-me", &file, None).await.unwrap();
    db.insert_job("key-me", &job, None).await.unwrap();
    db.steer(&caller("p", "key-other"), &job.id, Wish::Pause).await.unwrap();
    db.steer(&me, &job.id, Wish::Resume).await.unwrap();
    let claimed = store.claim("worker-1", 90).await.unwrap().job;
    db.succeed(&claimed, &a_publication(&claimed)).await.unwrap();
    db.insert_adapter("key-me", &adapter, None).await.unwrap();
    db.delete_adapter(&me, &adapter.id).await.unwrap();
    db.delete_file(&me, &file.id).await.unwrap();
    let key = ApiKey {
        id: "key-new".to_owned(),
        project: "p".to_owned(),
        sha256: "hash".to_owned(),
        scopes: vec![Scope::All],
        created_at: 1,
        revoked_at: None,
    };
    for _ in 0..2 {
        db.insert_key(&key).await.unwrap();
    }
    for _ in 0..2 {
        db.revoke_key("key-new").await.unwrap();
    }
    // What is refused leaves nothing.
    db.steer(&me, &job.id, Wish::Cancel).await.unwrap_err();

    let rows = sqlx::query("SELECT * FROM audit ORDER BY seq").fetch_all(&store.raw).await.unwrap();
    let column = |row: &sqlx::any::AnyRow, name: &str| row.get::<String, _>(name);
    let log: Vec<_> = rows.iter().map(|row| ["actor", "action", "subject"].map(|name| column(row, name))).collect();
    let expected = [
        ["key-me", "file.create", &file.id],
        ["key-me", "job.create", &job.id],
        ["key-other", "job.pause", &job.id],
        ["key-me", "job.resume", &job.id],
        ["worker-1", "job.succeed", &job.id],
        ["key-me", "adapter.create", &adapter.id],
        ["key-me", "adapter.delete", "ft:a"],
        ["key-me", "file.delete", &file.id],
        ["operator", "key.create", "key-new"],
        ["operator", "key.revoke", "key-new"],
    ];
    assert_eq!(log, expected);
}

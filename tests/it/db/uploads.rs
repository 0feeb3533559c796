//! Uploads end once.

use attune::{
    db::DbError,
    domain::{
        Caller,
        upload::{PartRecord, UploadRecord, UploadStatus},
    },
};

use super::{Store, on_both};

on_both!(of_many_ends_one_counts, time_ends_an_upload_too);

fn upload(id: &str, lifetime: i64) -> UploadRecord {
    let now = chrono::Utc::now().timestamp();
    UploadRecord {
        id: id.to_owned(),
        project: "p".to_owned(),
        filename: "f".to_owned(),
        purpose: "fine-tune".to_owned(),
        bytes: 10,
        status: UploadStatus::Pending,
        created_at: now,
        expires_at: now + lifetime,
        file_id: None,
    }
}

fn part(id: &str, upload: &str, bytes: i64) -> PartRecord {
    PartRecord { id: id.to_owned(), upload_id: upload.to_owned(), bytes, created_at: 1 }
}

fn caller() -> Caller {
    Caller { project: "p".to_owned(), key: "key-a".to_owned() }
}

async fn of_many_ends_one_counts(store: Store) {
    store.db.insert_upload(&caller(), &upload("u", 3600)).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..4 {
        let (db, part) = (store.other().await, part(&format!("part{i}"), "u", 4));
        tasks.spawn(async move { db.insert_part(&part).await.is_ok() });
    }
    let kept = tasks.join_all().await.into_iter().filter(|kept| *kept).count();
    assert_eq!((kept, store.db.parts("u").await.unwrap().len()), (2, 2), "two of 4 bytes fit into 10");

    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..6 {
        let db = store.other().await;
        let status = if i % 2 == 0 { UploadStatus::Completed } else { UploadStatus::Cancelled };
        tasks.spawn(async move { db.end_upload(&caller(), "u", status, None).await.unwrap() });
    }
    assert_eq!(tasks.join_all().await.into_iter().filter(|ended| *ended).count(), 1);
    assert!(matches!(store.db.insert_part(&part("late", "u", 1)).await, Err(DbError::Conflict(_))));
    assert_ne!(store.db.upload("p", "u").await.unwrap().status, UploadStatus::Pending);
    assert!(matches!(store.db.upload("q", "u").await, Err(DbError::NotFound)));
}

async fn time_ends_an_upload_too(store: Store) {
    let db = &store.db;
    for (id, lifetime) in [("old", 3600), ("young", 3600)] {
        db.insert_upload(&caller(), &upload(id, lifetime)).await.unwrap();
        db.insert_part(&part(&format!("of {id}"), id, 3)).await.unwrap();
    }
    store.run("UPDATE uploads SET expires_at = expires_at - 7200 WHERE id = 'old'").await;
    assert_eq!(db.upload("p", "old").await.unwrap().status, UploadStatus::Expired);
    assert!(matches!(db.insert_part(&part("late", "old", 1)).await, Err(DbError::Conflict(_))));
    assert!(!db.end_upload(&caller(), "old", UploadStatus::Completed, Some("f")).await.unwrap());
    assert_eq!(db.expire_uploads().await.unwrap(), [part("of old", "old", 3)]);
    assert_eq!(db.expire_uploads().await.unwrap(), [], "each part is given once");
    assert_eq!(db.parts("young").await.unwrap().len(), 1);
}

//! Names of adapters, and keys.

use attune::{
    db::DbError,
    domain::{ApiKey, Scope, id},
};

use super::{Store, a_checkpoint, a_job, a_publication, an_adapter, caller, on_both};

on_both!(a_name_is_given_once, an_adapter_is_found_by_id_and_by_name, keys_are_listed_and_revoked);

async fn a_name_is_given_once(store: Store) {
    let db = &store.db;
    let first = an_adapter("p", "ft:name", None, "one");
    db.insert_adapter("key-a", &first, None).await.unwrap();
    let refused = db.insert_adapter("key-a", &an_adapter("p", "ft:name", None, "two"), None).await;
    assert!(matches!(&refused, Err(DbError::Conflict(why)) if why.contains("ft:name")), "{refused:?}");
    db.insert_adapter("key-b", &an_adapter("q", "ft:name", None, "two"), None).await.unwrap();

    // A job whose name is taken publishes nothing.
    let job = a_job(0);
    store.insert(&job).await;
    let job = store.claim("a", 90).await.unwrap().job;
    db.insert_adapter("key-a", &an_adapter("p", &job.output_model, None, "other"), None).await.unwrap();
    let refused = db.succeed(&job, &a_publication(&job)).await;
    assert!(matches!(refused, Err(DbError::Conflict(_))), "{refused:?}");
    assert_eq!(store.job(&job.id).await.fine_tuned_model, None);
    assert_eq!(store.count("files").await, 0);
    assert_eq!(db.adapter("p", &job.output_model).await.unwrap().generation, "other");

    // A checkpoint of the same step, made again by a later attempt of the same job, takes the place of the first.
    let checkpoint = a_checkpoint(&job, 4);
    let adapter = |generation| an_adapter("p", &checkpoint.model, Some((&job, Some(4))), generation);
    db.record_checkpoint(&job, &checkpoint, Some(&adapter("early"))).await.unwrap();
    db.record_checkpoint(&job, &a_checkpoint(&job, 4), Some(&adapter("again"))).await.unwrap();
    assert_eq!(db.adapter("p", &checkpoint.model).await.unwrap().generation, "again");
    assert_eq!(db.checkpoints(&job.id).await.unwrap().len(), 1);
    // Nobody else's does.
    let stranger = a_job(0);
    let stolen = an_adapter("p", &checkpoint.model, Some((&stranger, Some(4))), "stolen");
    let refused = db.insert_adapter("key-a", &stolen, None).await;
    assert!(matches!(refused, Err(DbError::Conflict(_))), "{refused:?}");
    assert_eq!(db.adapter("p", "ft:name").await.unwrap(), first);
}

async fn an_adapter_is_found_by_id_and_by_name(store: Store) {
    let db = &store.db;
    let (one, two) = (an_adapter("p", "ft:one", None, "same"), an_adapter("p", "ft:two", None, "same"));
    for adapter in [&one, &two] {
        db.insert_adapter("key-a", adapter, None).await.unwrap();
    }
    for name in [&one.id, &one.model] {
        assert_eq!(db.adapter("p", name).await.unwrap(), one);
        assert!(matches!(db.adapter("q", name).await, Err(DbError::NotFound)));
    }
    assert!(matches!(db.delete_adapter(&caller("q", "key-b"), "ft:one").await, Err(DbError::NotFound)));
    let (gone, in_use) = db.delete_adapter(&caller("p", "key-a"), "ft:one").await.unwrap();
    assert_eq!((gone, in_use), (one.clone(), true), "another name has the same files");
    assert!(!db.delete_adapter(&caller("p", "key-a"), &two.id).await.unwrap().1);
    assert!(matches!(db.adapter("p", &one.id).await, Err(DbError::NotFound)));
}

async fn keys_are_listed_and_revoked(store: Store) {
    let db = &store.db;
    assert!(!db.has_keys().await.unwrap());
    let key = |n: i64| ApiKey {
        id: id::new("key-"),
        project: "p".to_owned(),
        sha256: format!("hash {n}"),
        scopes: vec![Scope::Inference, Scope::Read],
        created_at: n,
        revoked_at: None,
    };
    let (one, two) = (key(1), key(2));
    for key in [&one, &two, &one] {
        db.insert_key(key).await.unwrap();
    }
    assert_eq!(db.keys().await.unwrap(), [one.clone(), two.clone()]);
    assert_eq!(db.key("hash 1").await.unwrap(), one);
    let revoked = db.revoke_key(&one.id).await.unwrap();
    assert!(revoked.revoked_at.is_some());
    assert!(matches!(db.key("hash 1").await, Err(DbError::NotFound)));
    assert_eq!(db.key("hash 2").await.unwrap(), two);
    assert_eq!(db.revoke_key(&one.id).await.unwrap(), revoked, "the first time counts");
    assert_eq!(db.keys().await.unwrap(), [revoked, two.clone()]);
    db.insert_key(&one).await.unwrap();
    assert!(matches!(db.key("hash 1").await, Err(DbError::NotFound)), "a revoked key does not come back");
    assert!(matches!(db.revoke_key("key-none").await, Err(DbError::NotFound)));
    db.revoke_key(&two.id).await.unwrap();
    assert!(!db.has_keys().await.unwrap());
}

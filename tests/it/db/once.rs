//! What is made under an idempotency key is made once.

use attune::db::{DbError, Once};

use super::{Store, a_file, a_job, an_adapter, on_both};

on_both!(a_key_makes_one_thing, of_many_at_once_one_makes_it);

fn once(key: &str) -> Once {
    Once { key: key.to_owned(), request: "hash".to_owned() }
}

async fn a_key_makes_one_thing(store: Store) {
    let db = &store.db;
    assert_eq!(db.answer("p", "k").await.unwrap(), None);
    let job = a_job(0);
    db.insert_job("key-a", &job, Some(&once("k"))).await.unwrap();
    let (request, answer) = db.answer("p", "k").await.unwrap().unwrap();
    assert_eq!(request, "hash");
    assert_eq!(serde_json::from_str::<attune::domain::Job>(&answer).unwrap(), job);
    assert_eq!(db.answer("q", "k").await.unwrap(), None, "keys are a project's own");

    let again = [
        db.insert_job("key-a", &a_job(0), Some(&once("k"))).await,
        db.insert_file("key-a", &a_file("p"), Some(&once("k"))).await,
        db.insert_adapter("key-a", &an_adapter("p", "ft:a", None, "g"), Some(&once("k"))).await,
    ];
    for refused in again {
        assert!(matches!(refused, Err(DbError::Answered)), "{refused:?}");
    }
    assert_eq!((store.count("jobs").await, store.count("files").await, store.count("adapters").await), (1, 0, 0));
    db.insert_file("key-b", &a_file("q"), Some(&once("k"))).await.unwrap();

    // After a day the key is new again.
    store.run("UPDATE answers SET created_at = created_at - 86000").await;
    assert!(matches!(db.insert_job("key-a", &a_job(0), Some(&once("k"))).await, Err(DbError::Answered)));
    store.run("UPDATE answers SET created_at = created_at - 500").await;
    assert_eq!(db.answer("p", "k").await.unwrap(), None);
    db.insert_job("key-a", &a_job(0), Some(&once("k"))).await.unwrap();
    assert_eq!(store.count("jobs").await, 2);
    assert_eq!(store.count("answers").await, 1, "old answers are removed");
}

async fn of_many_at_once_one_makes_it(store: Store) {
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let db = store.other().await;
        tasks.spawn(async move { db.insert_job("key-a", &a_job(0), Some(&once("k"))).await });
    }
    let (made, refused): (Vec<_>, Vec<_>) = tasks.join_all().await.into_iter().partition(Result::is_ok);
    assert_eq!(made.len(), 1);
    assert!(refused.iter().all(|refused| matches!(refused, Err(DbError::Answered))), "{refused:?}");
    assert_eq!(store.count("jobs").await, 1);
}

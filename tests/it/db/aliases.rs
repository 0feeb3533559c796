//! Aliases: of many who expect the same, one moves it.

use attune::{
    db::DbError,
    domain::{Caller, Expected},
};

use super::{Store, an_adapter, on_both};

on_both!(one_of_many_moves_an_alias,);

async fn one_of_many_moves_an_alias(store: Store) {
    let caller = Caller { project: "p".to_owned(), key: "key-a".to_owned() };
    let mut adapters = Vec::new();
    for i in 0..8 {
        let adapter = an_adapter("p", &format!("ft:{i}"), None, &format!("generation {i}"));
        store.db.insert_adapter("key-a", &adapter, None).await.unwrap();
        adapters.push(adapter);
    }
    let mut expected = Expected::Absent;
    for _ in 0..5 {
        let mut tasks = tokio::task::JoinSet::new();
        // Whoever moves it to where it is changes nothing that the next could notice.
        let others = adapters.iter().filter(|adapter| expected != Expected::Generation(adapter.generation.clone()));
        for adapter in others.cloned().collect::<Vec<_>>() {
            let (db, caller, expected) = (store.other().await, caller.clone(), expected.clone());
            tasks.spawn(async move {
                match db.move_alias(&caller, "live", &adapter, &expected).await {
                    Ok(()) => Some(adapter.generation),
                    Err(DbError::Conflict(_)) => None,
                    Err(error) => panic!("{error}"),
                }
            });
        }
        let moved: Vec<String> = tasks.join_all().await.into_iter().flatten().collect();
        let now = store.db.alias("p", "live").await.unwrap();
        assert_eq!(moved, std::slice::from_ref(&now.generation));
        assert_eq!(store.db.aliased("p", "live").await.unwrap().generation, now.generation);
        expected = Expected::Generation(now.generation);
    }
    assert!(matches!(store.db.alias("other", "live").await, Err(DbError::NotFound)));
}

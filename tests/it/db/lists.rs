//! Pages: no row lost or doubled, in the order of creation, though all rows are of the same second.

use attune::db::{DbError, Page};

use super::{Store, a_file, a_job, an_adapter, caller, on_both, step};

on_both!(files_are_paged, jobs_are_paged, adapters_are_paged, events_are_paged);

const ROWS: usize = 23;

/// The ids of a whole list, page by page.
async fn walk<T>(
    limit: usize,
    id: impl Fn(&T) -> String,
    mut page: impl AsyncFnMut(Option<&str>, usize) -> Result<Page<T>, DbError>,
) -> Vec<String> {
    let mut ids: Vec<String> = Vec::new();
    loop {
        let found = page(ids.last().map(String::as_str), limit).await.unwrap();
        assert!(found.data.len() == limit || !found.has_more, "a page that is not the last is full");
        ids.extend(found.data.iter().map(&id));
        if !found.has_more {
            return ids;
        }
    }
}

async fn files_are_paged(store: Store) {
    let mut made = Vec::new();
    for n in 0..ROWS {
        let file = a_file("p");
        store.db.insert_file("key-a", &file, None).await.unwrap();
        // Another project's rows stand between.
        store.db.insert_file("key-b", &a_file("q"), None).await.unwrap();
        if n == 7 {
            store.db.delete_file(&caller("p", "key-a"), &file.id).await.unwrap();
        } else {
            made.push(file.id);
        }
    }
    let newest_first: Vec<_> = made.iter().rev().cloned().collect();
    for limit in [1, 4, 100] {
        for (ascending, expected) in [(true, &made), (false, &newest_first)] {
            let page = async |after: Option<&str>, limit| store.db.files("p", None, after, ascending, limit).await;
            assert_eq!(walk(limit, |file| file.id.clone(), page).await, *expected, "{limit} {ascending}");
        }
    }
    let foreign = store.db.files("q", None, Some(&made[0]), false, 5).await;
    assert!(matches!(foreign, Err(DbError::NotFound)), "{foreign:?}");
    assert!(store.db.files("p", Some("batch"), None, false, 5).await.unwrap().data.is_empty());
}

async fn jobs_are_paged(store: Store) {
    let mut made = Vec::new();
    for _ in 0..ROWS {
        let job = a_job(0);
        store.insert(&job).await;
        made.insert(0, job.id);
    }
    // What happens to a job does not move it.
    store.claim("a", 90).await.unwrap();
    for limit in [1, 4, 100] {
        let page = async |after: Option<&str>, limit| store.db.jobs("p", after, limit).await;
        assert_eq!(walk(limit, |job| job.id.clone(), page).await, made, "{limit}");
    }
    assert!(matches!(store.db.jobs("q", Some(&made[0]), 5).await, Err(DbError::NotFound)));
}

async fn adapters_are_paged(store: Store) {
    let mut made = Vec::new();
    for n in 0..ROWS {
        let adapter = an_adapter("p", &format!("ft:{n}"), None, "g");
        store.db.insert_adapter("key-a", &adapter, None).await.unwrap();
        made.insert(0, adapter.id);
    }
    for limit in [1, 4, 100] {
        let page = async |after: Option<&str>, limit| store.db.adapters("p", after, limit).await;
        assert_eq!(walk(limit, |adapter| adapter.id.clone(), page).await, made, "{limit}");
    }
    assert!(matches!(store.db.adapters("q", Some(&made[0]), 5).await, Err(DbError::NotFound)));
}

async fn events_are_paged(store: Store) {
    let job = a_job(0);
    store.insert(&job).await;
    let claimed = store.claim("a", 90).await.unwrap().job;
    for n in 1..=ROWS as u64 {
        store.db.record(&claimed, &[step(n)], None).await.unwrap();
        // A resumed run repeats its steps: they are kept once.
        store.db.record(&claimed, &[step(n / 2 + 1)], None).await.unwrap();
    }
    let all = store.db.events_since(&job.id, 0, 1000).await.unwrap();
    assert_eq!(all.len(), ROWS + 2, "created, attempt started, and a line a step");
    let numbers: Vec<i64> = all.iter().map(|event| event.seq).collect();
    assert_eq!(numbers, (1..=all.len() as i64).collect::<Vec<_>>(), "without gaps");
    let steps: Vec<_> = all.iter().filter_map(|event| event.data.as_ref()?["step"].as_u64()).collect();
    assert_eq!(steps, (1..=ROWS as u64).collect::<Vec<_>>());
    let newest_first: Vec<_> = all.iter().rev().map(|event| event.id.clone()).collect();
    for limit in [1, 4, 100] {
        let page = async |after: Option<&str>, limit| store.db.events("p", &job.id, after, limit).await;
        assert_eq!(walk(limit, |event| event.id.clone(), page).await, newest_first, "{limit}");
    }
    assert_eq!(store.db.events_since(&job.id, 5, 3).await.unwrap(), all[5..8]);
    assert!(matches!(store.db.events("q", &job.id, None, 5).await, Err(DbError::NotFound)));
    assert!(matches!(store.db.events("p", &job.id, Some("ftevent-none"), 5).await, Err(DbError::NotFound)));
}

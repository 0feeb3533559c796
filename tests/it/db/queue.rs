//! The queue: leases, fences, poison.

use std::collections::BTreeSet;

use attune::{
    db::DbError,
    domain::{Failure, JobStatus},
};

use super::{Store, a_checkpoint, a_job, a_publication, an_adapter, on_both, step};

on_both!(
    a_lost_lease_cannot_write,
    a_lease_is_kept_by_its_heartbeat,
    three_barren_attempts_fail_the_job,
    a_worker_that_goes_away_uses_up_no_attempt,
    a_passing_fault_pauses_longer_each_time,
    eight_workers_claim_each_job_once,
    jobs_come_by_priority_and_then_in_order,
    a_worker_takes_only_what_it_has_the_base_for,
);

/// Lets every lease run out.
const EXPIRE: &str = "UPDATE jobs SET lease_until = 1 WHERE status = 'running'";

async fn a_lost_lease_cannot_write(store: Store) {
    let job = a_job(0);
    store.insert(&job).await;
    let old = store.claim("a", -5).await.unwrap().job;
    let new = store.claim("b", 90).await.expect("an expired lease is claimed again").job;
    assert_eq!((old.fence, new.fence), (1, 2));
    assert_eq!(old.id, new.id);

    let db = &store.db;
    let events = store.count("events").await;
    let failure = Failure { code: "internal".to_owned(), message: "late".to_owned(), param: None };
    let adapter = an_adapter("p", "ft:late", Some((&old, Some(3))), "late");
    let late = [
        ("heartbeat", db.heartbeat(&old, 90).await.map(drop)),
        ("record", db.record(&old, &[step(1)], Some(5)).await.map(drop)),
        ("checkpoint", db.record_checkpoint(&old, &a_checkpoint(&old, 3), Some(&adapter)).await),
        ("succeed", db.succeed(&old, &a_publication(&old)).await),
        ("fail", db.fail(&old, &failure).await),
        ("cancelled", db.cancelled(&old).await),
        ("paused", db.paused(&old).await),
        ("released", db.released(&old).await),
        ("give_back", db.give_back(&old).await.map(drop)),
    ];
    for (what, refused) in late {
        assert!(matches!(refused, Err(DbError::Fenced)), "{what}: {refused:?}");
    }
    for table in ["checkpoints", "adapters", "files"] {
        assert_eq!(store.count(table).await, 0, "{table}");
    }
    assert_eq!(store.count("events").await, events);
    let now = store.job(&job.id).await;
    assert_eq!((now.status, now.estimated_finish), (JobStatus::Running, None));

    // The one that holds the lease can.
    db.record(&new, &[step(1)], Some(5)).await.unwrap();
    db.record_checkpoint(&new, &a_checkpoint(&new, 1), None).await.unwrap();
    db.succeed(&new, &a_publication(&new)).await.unwrap();
    let ended = store.job(&job.id).await;
    assert_eq!((ended.status, ended.trained_tokens), (JobStatus::Succeeded, Some(11)));
    assert_eq!(ended.fine_tuned_model.as_deref(), Some(job.output_model.as_str()));
    let again = db.succeed(&new, &a_publication(&new)).await;
    assert!(matches!(again, Err(DbError::Fenced)), "a result is published once: {again:?}");
    assert!(store.claim("c", 90).await.is_none());
}

async fn a_lease_is_kept_by_its_heartbeat(store: Store) {
    store.insert(&a_job(0)).await;
    let job = store.claim("a", 90).await.unwrap().job;
    assert!(store.claim("b", 90).await.is_none(), "a lease that holds is not claimed");
    store.db.heartbeat(&job, -5).await.unwrap();
    store.db.heartbeat(&job, 90).await.unwrap();
    assert!(store.claim("b", 90).await.is_none(), "the last heartbeat counts");
    store.db.heartbeat(&job, -5).await.unwrap();
    assert_eq!(store.claim("b", 90).await.unwrap().job.fence, 2);
}

async fn three_barren_attempts_fail_the_job(store: Store) {
    let job = a_job(0);
    store.insert(&job).await;
    store.claim("a", -5).await.unwrap();
    // A step is progress, and so is a checkpoint: the count begins again.
    let second = store.claim("a", 90).await.unwrap().job;
    store.db.record(&second, &[step(1)], None).await.unwrap();
    store.run(EXPIRE).await;
    let third = store.claim("a", 90).await.unwrap().job;
    assert_eq!(third.barren_attempts, 1);
    store.db.record_checkpoint(&third, &a_checkpoint(&third, 1), None).await.unwrap();
    store.run(EXPIRE).await;
    for _ in 0..3 {
        store.claim("a", -5).await.expect("three attempts are allowed");
    }
    assert!(store.claim("a", 90).await.is_none());
    let failed = store.job(&job.id).await;
    assert_eq!(failed.status, JobStatus::Failed);
    let error = failed.error.unwrap();
    assert_eq!(error.code, "internal_poison");
    assert_eq!(error.message, "3 attempts ended without a step or a checkpoint");
    let newest = store.db.events("p", &job.id, None, 1).await.unwrap().data.remove(0);
    assert_eq!((newest.level.as_str(), newest.message), ("error", format!("The job failed: {}", error.message)));
    assert!(store.claim("a", 90).await.is_none());
}

async fn a_worker_that_goes_away_uses_up_no_attempt(store: Store) {
    let job = a_job(0);
    store.insert(&job).await;
    for _ in 0..5 {
        let claimed = store.claim("a", 90).await.expect("released jobs are queued again").job;
        store.db.released(&claimed).await.unwrap();
        assert_eq!(store.job(&job.id).await.status, JobStatus::Queued);
    }
    // But it forgives no crash: three of them among releases are enough.
    for _ in 0..3 {
        store.claim("a", -5).await.unwrap();
        if let Some(claimed) = store.claim("a", 90).await {
            store.db.released(&claimed.job).await.unwrap();
        }
    }
    assert!(store.claim("a", 90).await.is_none());
    assert_eq!(store.job(&job.id).await.error.unwrap().code, "internal_poison");
}

async fn a_passing_fault_pauses_longer_each_time(store: Store) {
    let job = a_job(0);
    store.insert(&job).await;
    let mut pauses = Vec::new();
    for _ in 0..9 {
        let claimed = store.claim("a", 90).await.expect("passing faults do not poison").job;
        pauses.push(store.db.give_back(&claimed).await.unwrap());
        assert!(store.claim("b", 90).await.is_none(), "not before its time");
        store.run(EXPIRE).await;
    }
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 64, 64]);
    let claimed = store.claim("a", 90).await.unwrap().job;
    store.db.record(&claimed, &[step(2)], None).await.unwrap();
    assert_eq!(store.db.give_back(&claimed).await.unwrap(), 1, "a step begins the count again");
}

async fn eight_workers_claim_each_job_once(store: Store) {
    let mut made = BTreeSet::new();
    for _ in 0..200 {
        let job = a_job(0);
        store.insert(&job).await;
        made.insert(job.id);
    }
    let mut workers = tokio::task::JoinSet::new();
    for n in 0..8 {
        // Each as a process of its own would.
        let db = store.other().await;
        workers.spawn(async move {
            let mut claimed = Vec::new();
            while let Some(claim) = db.claim(&format!("worker-{n}"), &["other", super::BASE], 90).await.unwrap() {
                claimed.push(claim.job.id);
            }
            claimed
        });
    }
    let claimed: Vec<String> = workers.join_all().await.into_iter().flatten().collect();
    assert_eq!(claimed.len(), 200);
    assert_eq!(claimed.into_iter().collect::<BTreeSet<_>>(), made);
}

async fn jobs_come_by_priority_and_then_in_order(store: Store) {
    let mut expected = Vec::new();
    for priority in [0, 5, -5, 0, 5, 0, 0, -5, 5, 0] {
        let job = a_job(priority);
        store.insert(&job).await;
        expected.push((-priority, job.id));
    }
    // Stable: the order of creation stays within a priority.
    expected.sort_by_key(|(priority, _)| *priority);
    for (_, id) in expected {
        assert_eq!(store.claim("a", 90).await.unwrap().job.id, id);
    }
}

async fn a_worker_takes_only_what_it_has_the_base_for(store: Store) {
    store.insert(&a_job(0)).await;
    for bases in [&[][..], &["other"], &["tin", "tiny2"]] {
        assert!(store.db.claim("a", bases, 90).await.unwrap().is_none(), "{bases:?}");
    }
    assert!(store.db.claim("a", &["other", "tiny"], 90).await.unwrap().is_some());
}

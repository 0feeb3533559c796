//! Pause, resume and cancel, also at the moment when a worker claims or ends.

use attune::{
    db::{DbError, Wish},
    domain::{Job, JobStatus},
};

use super::{Store, a_job, a_publication, caller, on_both, step};

on_both!(
    a_queued_job_changes_at_once,
    a_running_job_is_told_and_answers,
    an_ended_job_stays_as_it_is,
    a_wish_is_never_lost_to_a_claim,
    processes_do_not_refuse_each_other,
);

async fn steer(store: &Store, job: &str, wish: Wish) -> Result<Job, DbError> {
    store.db.steer(&caller("p", "key-a"), job, wish).await
}

async fn a_queued_job_changes_at_once(store: Store) {
    let job = a_job(0);
    store.insert(&job).await;
    assert!(matches!(steer(&store, &job.id, Wish::Resume).await, Err(DbError::Conflict(_))));
    assert_eq!(steer(&store, &job.id, Wish::Pause).await.unwrap().status, JobStatus::Paused);
    assert!(store.claim("a", 90).await.is_none());
    assert_eq!(steer(&store, &job.id, Wish::Resume).await.unwrap().status, JobStatus::Queued);
    assert!(store.claim("a", -5).await.is_some());

    let other = a_job(0);
    store.insert(&other).await;
    let cancelled = steer(&store, &other.id, Wish::Cancel).await.unwrap();
    assert_eq!(cancelled.status, JobStatus::Cancelled);
    assert!(cancelled.finished_at.is_some());
    let foreign = store.db.steer(&caller("q", "key-b"), &job.id, Wish::Cancel).await;
    assert!(matches!(foreign, Err(DbError::NotFound)), "{foreign:?}");
}

async fn a_running_job_is_told_and_answers(store: Store) {
    let id = {
        let job = a_job(0);
        store.insert(&job).await;
        job.id
    };
    let job = store.claim("a", 90).await.unwrap().job;
    let told = async || store.db.record(&job, &[], None).await.unwrap();
    assert_eq!(told().await, None);
    steer(&store, &id, Wish::Pause).await.unwrap();
    assert_eq!(told().await.as_deref(), Some("pause"));
    assert_eq!(store.db.heartbeat(&job, 90).await.unwrap().as_deref(), Some("pause"));
    steer(&store, &id, Wish::Resume).await.unwrap();
    assert_eq!(told().await, None, "the pause was taken back");
    steer(&store, &id, Wish::Pause).await.unwrap();
    store.db.paused(&job).await.unwrap();
    let paused = store.job(&id).await;
    assert_eq!((paused.status, paused.requested), (JobStatus::Paused, None));
    assert!(matches!(store.db.record(&job, &[step(1)], None).await, Err(DbError::Fenced)), "the attempt is over");

    steer(&store, &id, Wish::Resume).await.unwrap();
    let job = store.claim("b", 90).await.unwrap().job;
    steer(&store, &id, Wish::Pause).await.unwrap();
    steer(&store, &id, Wish::Cancel).await.unwrap();
    assert!(matches!(steer(&store, &id, Wish::Pause).await, Err(DbError::Conflict(_))), "a cancellation stays");
    store.db.paused(&job).await.unwrap();
    assert_eq!(store.job(&id).await.status, JobStatus::Cancelled, "it came while the pause was made");
}

async fn an_ended_job_stays_as_it_is(store: Store) {
    let job = a_job(0);
    store.insert(&job).await;
    let claimed = store.claim("a", 90).await.unwrap().job;
    store.db.succeed(&claimed, &a_publication(&claimed)).await.unwrap();
    for wish in [Wish::Pause, Wish::Resume, Wish::Cancel] {
        match steer(&store, &job.id, wish).await {
            Err(DbError::Conflict(message)) => assert!(message.contains("a job that is succeeded cannot"), "{message}"),
            other => panic!("{wish:?}: {other:?}"),
        }
    }
    assert_eq!(store.job(&job.id).await.status, JobStatus::Succeeded);
}

/// A claim and a cancellation at once: the job is cancelled and nobody works on it, or its worker is told.
async fn a_wish_is_never_lost_to_a_claim(store: Store) {
    let (a, b) = (store.other().await, store.other().await);
    for round in 0..60 {
        let job = a_job(0);
        store.insert(&job).await;
        let (id, claimer, user) = (job.id.clone(), a.clone(), b.clone());
        let claim = tokio::spawn(async move { claimer.claim("a", &[super::BASE], 90).await });
        let cancel = tokio::spawn(async move { user.steer(&caller("p", "key-a"), &id, Wish::Cancel).await });
        let (claimed, cancelled) = (claim.await.unwrap().unwrap(), cancel.await.unwrap().unwrap());
        let now = store.job(&job.id).await;
        match claimed {
            None => assert_eq!(cancelled.status, JobStatus::Cancelled, "round {round}"),
            Some(claim) => {
                assert_eq!(
                    (now.status, now.requested.as_deref()),
                    (JobStatus::Running, Some("cancel")),
                    "round {round}"
                );
                store.db.cancelled(&claim.job).await.unwrap();
            }
        }
        assert_eq!(store.job(&job.id).await.status, JobStatus::Cancelled, "round {round}");
    }
}

/// Transactions that read before they write, in several processes: each waits for the others, none is refused.
async fn processes_do_not_refuse_each_other(store: Store) {
    let mut processes = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let db = store.other().await;
        processes.spawn(async move {
            for _ in 0..25 {
                let job = a_job(0);
                db.insert_job("key-a", &job, None).await?;
                for wish in [Wish::Pause, Wish::Resume, Wish::Cancel] {
                    db.steer(&caller("p", "key-a"), &job.id, wish).await?;
                }
            }
            Ok::<_, DbError>(())
        });
    }
    for done in processes.join_all().await {
        done.unwrap();
    }
    assert_eq!(store.count("audit").await, 4 * 25 * 4);
}

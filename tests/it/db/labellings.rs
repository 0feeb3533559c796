//! Tasks that label pairs: leases, fences, and labels that outlive an attempt.

use std::collections::BTreeMap;

use attune::{
    db::DbError,
    domain::{
        Caller, Dropped, Failure, JobStatus, LabelReport, LabelSpec, Labelled, Labelling, Outcome, PairJudge, id,
    },
};
use serde_json::json;

use super::{BASE, Store, a_file, on_both};

on_both!(
    labels_outlive_an_attempt_and_a_lost_lease_writes_none,
    three_barren_attempts_fail_a_task,
    a_task_is_its_projects_and_can_be_cancelled,
);

fn task(base: &str) -> Labelling {
    Labelling {
        id: id::new("pref-"),
        project: "p".to_owned(),
        created_at: 1_800_000_000,
        started_at: None,
        finished_at: None,
        status: JobStatus::Queued,
        spec: LabelSpec {
            model: None,
            file: "file-a".to_owned(),
            judge: PairJudge::Model { model: "j".to_owned(), endpoint: None },
            criteria: vec!["'; DROP TABLE labels; --".to_owned()],
            sampling: Default::default(),
            min_margin: 0.1,
            max_dropped: 0.5,
        },
        base: base.to_owned(),
        total: 3,
        done: 0,
        report: None,
        result_file: None,
        error: None,
        metadata: Some(json!({"a": "b"})),
        fence: 0,
        barren_attempts: 0,
    }
}

fn label(n: u64) -> Labelled {
    let spent = BTreeMap::from([("j".to_owned(), (n, 1))]);
    Labelled { outcome: Outcome::Row(json!({"n": n})), orders: Some([0.9, 0.4]), spent }
}

async fn expire(store: &Store) {
    sqlx::query("UPDATE labellings SET lease_until = 1 WHERE status = 'running'").execute(&store.raw).await.unwrap();
}

async fn labels_outlive_an_attempt_and_a_lost_lease_writes_none(store: Store) {
    let (db, queued) = (&store.db, task(BASE));
    db.insert_labelling("key-a", &queued, None).await.unwrap();
    assert_eq!(db.labelling("p", &queued.id).await.unwrap(), queued);
    assert!(db.claim_labelling("w", &["other"], 90).await.unwrap().is_none(), "it has not the base");
    let old = db.claim_labelling("w", &["other", BASE], 90).await.unwrap().unwrap();
    assert!(db.claim_labelling("v", &[BASE], 90).await.unwrap().is_none(), "it is leased");
    db.record_label(&old, 3, &label(3)).await.unwrap();
    db.record_label(&old, 1, &label(1)).await.unwrap();
    expire(&store).await;
    let new = db.claim_labelling("v", &[BASE], 90).await.unwrap().unwrap();
    assert_eq!((old.fence, new.fence, new.done, new.barren_attempts), (1, 2, 2, 1));

    let failure = Failure { code: "internal".to_owned(), message: "late".to_owned(), param: None };
    let (file, report) = (a_file("p"), LabelReport::default());
    for (what, refused) in [
        ("heartbeat", db.heartbeat_labelling(&old, 90).await.map(drop)),
        ("record", db.record_label(&old, 2, &label(2)).await),
        ("finish", db.finish_labelling(&old, &file, &report).await),
        ("fail", db.fail_labelling(&old, &failure).await),
        ("cancelled", db.labelling_cancelled(&old).await),
        ("release", db.release_labelling(&old, 0).await),
    ] {
        assert!(matches!(refused, Err(DbError::Fenced)), "{what}: {refused:?}");
    }
    assert_eq!(store.count("files").await, 0);
    let dropped = Labelled { outcome: Outcome::Dropped(Dropped::Unjudged, Some("no".to_owned())), ..label(2) };
    db.record_label(&new, 2, &dropped).await.unwrap();
    let labels = db.labels(&new.id).await.unwrap();
    assert_eq!(labels, [(1, label(1)), (2, dropped), (3, label(3))]);
    let report = LabelReport::of(&labels.into_iter().map(|(_, label)| label).collect::<Vec<_>>());
    assert_eq!((report.rows, report.dropped["unjudged"], report.usage["j"].prompt_tokens), (2, 1, 6));
    db.finish_labelling(&new, &file, &report).await.unwrap();
    let ended = db.labelling("p", &new.id).await.unwrap();
    assert_eq!((ended.status, ended.done, ended.report), (JobStatus::Succeeded, 3, Some(report)));
    assert_eq!(ended.result_file.as_ref(), Some(&file.id));
    assert_eq!((store.count("labels").await, store.count("files").await), (0, 1));
    assert_eq!(db.file("p", &file.id).await.unwrap(), file);
}

async fn three_barren_attempts_fail_a_task(store: Store) {
    let (db, queued) = (&store.db, task(""));
    db.insert_labelling("key-a", &queued, None).await.unwrap();
    for _ in 0..3 {
        let claimed = db.claim_labelling("w", &[], 90).await.unwrap().expect("no base is needed");
        // An attempt that is given back does not count.
        db.release_labelling(&claimed, -5).await.unwrap();
        db.claim_labelling("w", &[], 90).await.unwrap().unwrap();
        expire(&store).await;
    }
    assert!(db.claim_labelling("w", &[], 90).await.unwrap().is_none());
    let failed = db.labelling("p", &queued.id).await.unwrap();
    assert_eq!((failed.status, failed.error.unwrap().code.as_str()), (JobStatus::Failed, "internal_poison"));
}

async fn a_task_is_its_projects_and_can_be_cancelled(store: Store) {
    let db = &store.db;
    let (first, second) = (task(BASE), task(BASE));
    for one in [&first, &second] {
        db.insert_labelling("key-a", one, None).await.unwrap();
    }
    assert!(db.file_is_in_use("file-a").await.unwrap());
    assert!(matches!(db.labelling("q", &first.id).await, Err(DbError::NotFound)));
    let caller = |project: &str| Caller { project: project.to_owned(), key: "key-a".to_owned() };
    assert!(matches!(db.cancel_labelling(&caller("q"), &first.id).await, Err(DbError::NotFound)));
    let page = db.labellings("p", None, 1).await.unwrap();
    assert_eq!((page.data[0].id.as_str(), page.has_more), (second.id.as_str(), true));
    let rest = db.labellings("p", Some(&second.id), 5).await.unwrap();
    assert_eq!((rest.data[0].id.as_str(), rest.data.len(), rest.has_more), (first.id.as_str(), 1, false));

    let running = db.claim_labelling("w", &[BASE], 90).await.unwrap().unwrap();
    assert_eq!(running.id, first.id, "the oldest first");
    assert_eq!(db.heartbeat_labelling(&running, 90).await.unwrap(), None);
    assert_eq!(db.cancel_labelling(&caller("p"), &first.id).await.unwrap().status, JobStatus::Running);
    assert_eq!(db.heartbeat_labelling(&running, 90).await.unwrap().as_deref(), Some("cancel"));
    db.labelling_cancelled(&running).await.unwrap();
    assert_eq!(db.cancel_labelling(&caller("p"), &second.id).await.unwrap().status, JobStatus::Cancelled);
    assert!(matches!(db.cancel_labelling(&caller("p"), &second.id).await, Err(DbError::Conflict(_))));
    assert!(!db.file_is_in_use("file-a").await.unwrap());
}

//! Batches: leases, fences, lines that are counted once.

use attune::{
    db::DbError,
    domain::{BatchError, BatchLine, BatchRecord, BatchStatus, Caller, Endpoint, FileRecord, id},
};

use super::{Store, on_both};

on_both!(a_lost_batch_cannot_be_written, lines_count_once_and_come_in_order, three_barren_attempts_fail_it,);

const EXPIRE: &str = "UPDATE batches SET lease_until = 1";

fn a_batch() -> BatchRecord {
    BatchRecord {
        id: id::new("batch_"),
        project: "p".to_owned(),
        endpoint: Endpoint::Chat,
        input_file: "file-a".to_owned(),
        completion_window: "24h".to_owned(),
        status: BatchStatus::Validating,
        errors: Vec::new(),
        model: None,
        metadata: None,
        output_file: None,
        error_file: None,
        total: 0,
        completed: 0,
        failed: 0,
        input_tokens: 0,
        output_tokens: 0,
        created_at: 1,
        expires_at: i64::MAX,
        in_progress_at: None,
        finalizing_at: None,
        completed_at: None,
        failed_at: None,
        expired_at: None,
        cancelling_at: None,
        cancelled_at: None,
        fence: 0,
    }
}

fn a_line(line: i64, is_ok: bool) -> BatchLine {
    BatchLine { line, is_ok, output: format!("line {line}"), input_tokens: 3, output_tokens: line }
}

fn a_file(batch: &BatchRecord) -> FileRecord {
    FileRecord {
        id: id::new("file-"),
        project: batch.project.clone(),
        filename: "out".to_owned(),
        purpose: "batch_output".to_owned(),
        bytes: 1,
        sha256: String::new(),
        status: "processed".to_owned(),
        status_details: None,
        created_at: 1,
    }
}

async fn a_lost_batch_cannot_be_written(store: Store) {
    let db = &store.db;
    db.insert_batch("key-a", &a_batch(), None).await.unwrap();
    let old = db.claim_batch(60).await.unwrap().unwrap();
    assert!(db.claim_batch(60).await.unwrap().is_none(), "it is held");
    sqlx::query(EXPIRE).execute(&store.raw).await.unwrap();
    let new = store.other().await.claim_batch(60).await.unwrap().expect("an expired lease is claimed again");
    assert_eq!((old.fence, new.fence), (1, 2));
    let error = BatchError { code: "c".to_owned(), message: "m".to_owned(), param: None, line: Some(1) };
    for (what, refused) in [
        ("beat", db.beat_batch(&old, 60).await.map(drop)),
        ("start", db.start_batch(&old, 9, None).await),
        ("fail", db.fail_batch(&old, std::slice::from_ref(&error)).await),
        ("record", db.record_lines(&old, &[a_line(1, true)]).await),
        ("finalize", db.finalize_batch(&old).await),
        ("end", db.end_batch(&old, BatchStatus::Completed, Some(&a_file(&old)), None).await),
        ("release", db.release_batch(&old).await),
    ] {
        assert!(matches!(refused, Err(DbError::Fenced)), "{what}: {refused:?}");
    }
    assert_eq!((store.count("files").await, store.count("batch_lines").await), (0, 0));
    let standing = db.beat_batch(&new, 60).await.unwrap();
    assert_eq!((standing.status, standing.is_late), (BatchStatus::Validating, false));
    sqlx::query("UPDATE batches SET expires_at = 1").execute(&store.raw).await.unwrap();
    assert!(db.beat_batch(&new, 60).await.unwrap().is_late);
    db.fail_batch(&new, std::slice::from_ref(&error)).await.unwrap();
    let now = db.batch("p", &new.id).await.unwrap();
    assert_eq!((now.status, now.errors), (BatchStatus::Failed, vec![error]));
    assert!(matches!(db.fail_batch(&new, &[]).await, Err(DbError::Fenced)), "it has ended");
}

async fn lines_count_once_and_come_in_order(store: Store) {
    let db = &store.db;
    db.insert_batch("key-a", &a_batch(), None).await.unwrap();
    let held = db.claim_batch(60).await.unwrap().unwrap();
    db.start_batch(&held, 4, Some("m")).await.unwrap();
    db.record_lines(&held, &[a_line(9, true), a_line(2, false)]).await.unwrap();
    db.record_lines(&held, &[a_line(9, true), a_line(4, true)]).await.unwrap();
    let now = db.batch("p", &held.id).await.unwrap();
    assert_eq!((now.status, now.total, now.completed, now.failed), (BatchStatus::InProgress, 4, 2, 1));
    assert_eq!((now.input_tokens, now.output_tokens, now.model.as_deref()), (9, 15, Some("m")));
    assert_eq!(db.finished_lines(&held).await.unwrap(), [2, 4, 9].into());
    assert_eq!(db.batch_results(&held.id, true, 0, 1).await.unwrap(), [(4, "line 4".to_owned())]);
    assert_eq!(db.batch_results(&held.id, true, 4, 5).await.unwrap(), [(9, "line 9".to_owned())]);
    let caller = Caller { project: "p".to_owned(), key: "key-a".to_owned() };
    let cancelled = db.cancel_batch(&caller, &held.id).await.unwrap();
    assert_eq!(db.cancel_batch(&caller, &held.id).await.unwrap(), cancelled);
    db.finalize_batch(&held).await.unwrap();
    assert_eq!(db.batch("p", &held.id).await.unwrap().status, BatchStatus::Cancelling, "the cancellation wins");
    let file = a_file(&held);
    db.end_batch(&held, BatchStatus::Cancelled, Some(&file), None).await.unwrap();
    let now = db.batch("p", &held.id).await.unwrap();
    assert_eq!((now.status, now.output_file, now.error_file), (BatchStatus::Cancelled, Some(file.id.clone()), None));
    assert!(now.cancelled_at.is_some() && now.completed_at.is_none());
    assert_eq!(db.file("p", &file.id).await.unwrap(), file);
    assert_eq!(store.count("batch_lines").await, 0);
    assert!(matches!(db.cancel_batch(&caller, &held.id).await, Err(DbError::Conflict(_))));
}

async fn three_barren_attempts_fail_it(store: Store) {
    let db = &store.db;
    let new = a_batch();
    db.insert_batch("key-a", &new, None).await.unwrap();
    for _ in 0..2 {
        db.claim_batch(60).await.unwrap().unwrap();
        sqlx::query(EXPIRE).execute(&store.raw).await.unwrap();
    }
    // One that got somewhere starts the count again; one that was given back does not count.
    let held = db.claim_batch(60).await.unwrap().unwrap();
    db.record_lines(&held, &[a_line(1, true)]).await.unwrap();
    sqlx::query(EXPIRE).execute(&store.raw).await.unwrap();
    let held = db.claim_batch(60).await.unwrap().unwrap();
    db.release_batch(&held).await.unwrap();
    for _ in 0..3 {
        db.claim_batch(60).await.unwrap().unwrap();
        sqlx::query(EXPIRE).execute(&store.raw).await.unwrap();
    }
    assert!(db.claim_batch(60).await.unwrap().is_none());
    let now = db.batch("p", &new.id).await.unwrap();
    assert_eq!((now.status, now.errors[0].code.as_str()), (BatchStatus::Failed, "internal_poison"));
}

//! Kept answers and what was said of them, until they are too old.

use attune::{
    db::{DbError, FeedbackFilter},
    domain::{Caller, Feedback, StoredCompletion, feedback::Judgement},
};
use serde_json::json;

use super::{Store, on_both};

on_both!(feedback_is_found_by_project_period_and_model, old_answers_go_with_what_was_said_of_them);

const DAY: i64 = 24 * 3600;

fn kept(id: &str, project: &str, model: &str, at: i64) -> StoredCompletion {
    StoredCompletion {
        id: id.to_owned(),
        project: project.to_owned(),
        model: model.to_owned(),
        fingerprint: "g".to_owned(),
        created_at: at,
        messages: vec![json!({"role": "user", "content": "'; DROP TABLE feedback; --"})],
        choices: vec!["a".to_owned(), "b".to_owned()],
    }
}

fn said(id: &str, completion: &StoredCompletion, at: i64, judgement: Judgement) -> Feedback {
    Feedback {
        id: id.to_owned(),
        project: completion.project.clone(),
        completion_id: completion.id.clone(),
        choice: 1,
        judgement,
        comment: Some("so".to_owned()),
        created_at: at,
    }
}

fn caller(project: &str) -> Caller {
    Caller { project: project.to_owned(), key: "key-a".to_owned() }
}

async fn now(store: &Store) -> i64 {
    store.db.insert_file("key-a", &super::a_file("clock"), None).await.unwrap();
    chrono::Utc::now().timestamp()
}

async fn feedback_is_found_by_project_period_and_model(store: Store) {
    let (db, now) = (&store.db, now(&store).await);
    let (one, two, theirs) = (kept("c1", "p", "m", now), kept("c2", "p", "n", now), kept("c3", "q", "m", now));
    for completion in [&one, &two, &theirs] {
        db.keep_completion(completion, 30 * DAY).await.unwrap();
    }
    assert_eq!(db.completion("p", "c1").await.unwrap(), one);
    assert!(matches!(db.completion("p", "c3").await, Err(DbError::NotFound)), "another project's");

    let all = [
        said("fb-1", &one, 100, Judgement::Thumb { up: true }),
        said("fb-2", &two, 200, Judgement::Correction { text: "c".to_owned() }),
        said("fb-3", &theirs, 300, Judgement::Rating { value: 2 }),
        said("fb-4", &one, 400, Judgement::Preference { over_completion: "c1".to_owned(), over_choice: 0 }),
    ];
    for feedback in &all {
        db.insert_feedback(&caller(&feedback.project), feedback, None).await.unwrap();
    }
    let ids = |filter: FeedbackFilter| async move {
        let found = db.feedback_of("p", &filter, 10).await.unwrap();
        found.into_iter().map(|feedback| feedback.id).collect::<Vec<_>>()
    };
    assert_eq!(ids(FeedbackFilter::default()).await, ["fb-1", "fb-2", "fb-4"]);
    assert_eq!(ids(FeedbackFilter { since: Some(200), until: Some(400), model: None }).await, ["fb-2", "fb-4"]);
    assert_eq!(ids(FeedbackFilter { since: None, until: Some(399), model: Some("m".to_owned()) }).await, ["fb-1"]);
    let page = db.feedback("p", None, 2).await.unwrap();
    assert_eq!((page.data, page.has_more), (vec![all[3].clone(), all[1].clone()], true));
    assert_eq!(db.feedback("p", Some("fb-2"), 2).await.unwrap().data, [all[0].clone()]);

    assert!(matches!(db.delete_feedback(&caller("q"), "fb-1").await, Err(DbError::NotFound)));
    db.delete_feedback(&caller("p"), "fb-1").await.unwrap();
    assert!(matches!(db.delete_completion(&caller("q"), "c1").await, Err(DbError::NotFound)));
    db.delete_completion(&caller("p"), "c1").await.unwrap();
    assert_eq!(ids(FeedbackFilter::default()).await, ["fb-2"], "its feedback went with it");
}

async fn old_answers_go_with_what_was_said_of_them(store: Store) {
    let (db, now) = (&store.db, now(&store).await);
    let old = kept("old", "p", "m", now - 2 * DAY - 60);
    db.keep_completion(&old, 30 * DAY).await.unwrap();
    db.insert_feedback(&caller("p"), &said("fb-1", &old, now, Judgement::Thumb { up: false }), None).await.unwrap();
    db.keep_completion(&kept("young", "p", "m", now - DAY), 3 * DAY).await.unwrap();
    assert_eq!((store.count("completions").await, store.count("feedback").await), (2, 1));
    db.keep_completion(&kept("new", "p", "m", now), 2 * DAY).await.unwrap();
    assert_eq!((store.count("completions").await, store.count("feedback").await), (2, 0));
}

//! The loop: accumulation, layout, resuming, endings.

use std::sync::Arc;

use attune::{
    data::{Example, Row},
    domain::{Control, MethodSpec, Snapshot, TrainSpec},
    model::Base,
    trainer::{Outcome, Run, TrainError, total_steps, train},
};
use serde_json::{Value, json};

use crate::support::{
    tiny::Tiny,
    training::{From, Recorder, finish, rows, run, spec},
};

fn base() -> Arc<Base> {
    let dir = tempfile::tempdir().unwrap();
    Tiny::default().write(dir.path());
    Base::open("tiny", dir.path()).unwrap()
}

fn lora() -> Value {
    json!({"type": "lora", "r": 3, "alpha": 7, "dropout": 0.2})
}

fn close(a: &[f64], b: &[f64], tolerance: f64) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < tolerance)
}

fn bits(losses: &[f64]) -> Vec<u64> {
    losses.iter().map(|loss| loss.to_bits()).collect()
}

fn file<'a>(snapshot: &'a Snapshot, name: &str) -> &'a [u8] {
    &snapshot.files.iter().find(|(file, _)| file == name).unwrap().1
}

#[test]
fn accumulation_weighs_tokens_and_not_micro_batches() {
    let (base, rows) = (base(), rows(&[17, 5, 9, 3], 3));
    let curve = |batch_size, grad_accumulation, packing| {
        let training = json!({"n_epochs": 4, "batch_size": batch_size, "grad_accumulation": grad_accumulation,
                              "learning_rate": 1e-2, "packing": packing});
        let adapter = json!({"type": "lora", "r": 3, "alpha": 7});
        let (_, recorder) = finish(&base, &spec(&base, adapter, training), &rows, From::default());
        (recorder.losses(), recorder.norms())
    };
    let (losses, norms) = curve(4, 1, false);
    for (batch, accumulation, packing) in [(2, 2, false), (1, 4, false), (4, 1, true), (2, 2, true)] {
        let (l, n) = curve(batch, accumulation, packing);
        assert!(close(&l, &losses, 1e-5) && close(&n, &norms, 1e-4), "{batch}×{accumulation}: {l:?} {losses:?}");
        assert!((l[0] - losses[0]).abs() < 1e-6);
    }
}

/// `auto` is f32 on a base of F32; bf16 is near it and not the same.
#[test]
fn precision_chooses_the_arithmetic() {
    let (base, rows) = (base(), rows(&[17, 5, 9, 3], 3));
    let curve = |precision: &str| {
        let training = json!({"n_epochs": 6, "batch_size": 2, "learning_rate": 1e-2, "precision": precision});
        finish(&base, &spec(&base, json!({"r": 3, "alpha": 7}), training), &rows, From::default()).1.losses()
    };
    let (auto, f32, bf16) = (curve("auto"), curve("f32"), curve("bf16"));
    assert_eq!(bits(&auto), bits(&f32));
    assert_ne!(bits(&bf16), bits(&f32));
    let is_near = bf16.iter().zip(&f32).all(|(a, b)| (a - b).abs() < 0.025 * b);
    assert!(is_near, "{bf16:?} {f32:?}");
}

/// Dropout on, an odd batch, a validation split: from each checkpoint the rest is the same to the last bit.
#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    // Some tensors have 4096 numbers and more, so that their moments are in 8 bits where that is asked for.
    let large = json!({"type": "lora", "r": 48, "alpha": 70, "dropout": 0.2, "exclude_modules": ["k_proj", "v_proj"]});
    resumes(lora(), json!({}));
    resumes(large.clone(), json!({"optimizer": "adamw_8bit"}));
    resumes(large, json!({"optimizer": "adamw_8bit", "gradient_checkpointing": true}));
}

fn resumes(adapter: Value, more: Value) {
    let (base, rows) = (base(), rows(&[12, 7, 9, 5, 14, 6, 8], 4));
    let mut training = json!({"n_epochs": 3, "batch_size": 2, "learning_rate": 5e-3, "checkpoint_every": 2,
                          "lr_scheduler": "cosine", "warmup_ratio": 0.2, "weight_decay": 0.1,
                          "validation_split": 0.15, "early_stopping": {"patience": 50}});
    let is_8bit = more.get("optimizer").is_some();
    training.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let spec = spec(&base, adapter, training);
    let (adapter, whole) = finish(&base, &spec, &rows, From::default());
    assert_eq!(whole.metrics.len() as u64, total_steps(&spec.training, 7, true));
    assert_eq!(total_steps(&spec.training, 7, false), 12);
    let steps: Vec<u64> = whole.snapshots.iter().map(|snapshot| snapshot.step).collect();
    assert_eq!(steps, [0, 2, 3, 4, 6, 8, 9]);
    for snapshot in &whole.snapshots {
        let (resumed, recorder) = finish(&base, &spec, &rows, From { resume: Some(snapshot), ..From::default() });
        assert_eq!(resumed, adapter, "from step {}", snapshot.step);
        assert_eq!(bits(&recorder.losses()), bits(&whole.losses()[snapshot.step as usize..]));
        for (ours, theirs) in recorder.snapshots.iter().rev().zip(whole.snapshots.iter().rev()) {
            assert_eq!(file(ours, "trainer.safetensors"), file(theirs, "trainer.safetensors"));
            assert_eq!(ours.files.iter().any(|(name, _)| name == "trainer.bin"), is_8bit);
            if is_8bit {
                assert_eq!(file(ours, "trainer.bin"), file(theirs, "trainer.bin"));
            }
        }
    }
    // And dropout is really there: without it the losses differ.
    let mut plain = spec.clone();
    let MethodSpec::Lora(lora) = &mut plain.adapter else { panic!("{:?}", plain.adapter) };
    lora.lora_dropout = 0.0;
    assert_ne!(finish(&base, &plain, &rows, From::default()).1.losses(), whole.losses());
}

#[test]
fn pause_drain_and_cancel_stop_within_a_step() {
    let (base, rows) = (base(), rows(&[6, 7, 8, 9], 5));
    let spec = spec(&base, lora(), json!({"n_epochs": 2, "batch_size": 1, "learning_rate": 1e-2}));
    let (adapter, whole) = finish(&base, &spec, &rows, From::default());
    for (control, checkpoints) in [(Control::Pause, 2), (Control::Drain, 2), (Control::Cancel, 1)] {
        let mut recorder = Recorder { control: Some((3, control)), ..Recorder::default() };
        let outcome = run(&base, &spec, &rows, From::default(), &mut recorder).unwrap();
        let as_asked = match control {
            Control::Pause => matches!(outcome, Outcome::Paused),
            Control::Drain => matches!(outcome, Outcome::Drained),
            _ => matches!(outcome, Outcome::Cancelled),
        };
        assert!(as_asked, "{control:?}: {outcome:?}");
        assert_eq!((recorder.metrics.len(), recorder.snapshots.len()), (3, checkpoints), "{control:?}");
        let last = recorder.snapshots.last().unwrap();
        let (resumed, rest) = finish(&base, &spec, &rows, From { resume: Some(last), ..From::default() });
        assert_eq!(resumed, adapter);
        assert_eq!(bits(&rest.losses()), bits(&whole.losses()[last.step as usize..]));
    }
}

#[test]
fn a_checkpoint_of_another_run_is_refused_by_name() {
    let (base, rows) = (base(), rows(&[6, 7], 6));
    let original = spec(&base, lora(), json!({"n_epochs": 1, "batch_size": 1}));
    let (_, recorder) = finish(&base, &original, &rows, From::default());
    let snapshot = &recorder.snapshots[1];
    let refusal = |spec: &TrainSpec, rows: &[Example], snapshot: &Snapshot| match run(
        &base,
        spec,
        rows,
        From { resume: Some(snapshot), ..From::default() },
        &mut Recorder::default(),
    ) {
        Err(error @ (TrainError::Checkpoint(_) | TrainError::Method(_))) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let mut other = original.clone();
    other.training.learning_rate = 0.5;
    assert!(refusal(&other, &rows, snapshot).contains("training.learning_rate is 0.0002 there and 0.5 here"));
    let other = TrainSpec { seed: 6, ..original.clone() };
    assert!(refusal(&other, &rows, snapshot).contains("seed"));
    let mut changed = rows.clone();
    changed[0].labels[3] = None;
    assert!(refusal(&original, &changed, snapshot).contains("the data differ"));
    let edit = |from: &str, to: &str| {
        let mut snapshot = snapshot.clone();
        let state = snapshot.files.iter_mut().find(|(name, _)| name == "trainer.json").unwrap();
        state.1 = String::from_utf8(state.1.clone()).unwrap().replace(from, to).into_bytes();
        snapshot
    };
    let version = env!("CARGO_PKG_VERSION");
    assert!(refusal(&original, &rows, &edit(version, "9.9.9")).contains("version is 9.9.9"));
    assert!(refusal(&original, &rows, &edit(&base.info.hash, "ab")).contains("base's hash is ab"));
    let mut lost = snapshot.clone();
    lost.files.retain(|(name, _)| name != "trainer.safetensors");
    assert!(refusal(&original, &rows, &lost).contains("trainer.safetensors is missing"));

    // Codes of another length than the variables'.
    let eight = json!({"n_epochs": 1, "batch_size": 1, "optimizer": "adamw_8bit"});
    let eight = spec(&base, json!({"r": 48, "alpha": 70, "exclude_modules": ["k_proj", "v_proj"]}), eight);
    let (_, recorder) = finish(&base, &eight, &rows, From::default());
    let with = |change: fn(&mut Vec<u8>)| {
        let mut snapshot = recorder.snapshots[1].clone();
        change(&mut snapshot.files.iter_mut().find(|(name, _)| name == "trainer.bin").unwrap().1);
        refusal(&eight, &rows, &snapshot)
    };
    assert!(with(|codes| codes.truncate(100)).contains("trainer.bin of the checkpoint is too short"));
    assert!(with(|codes| codes.push(0)).contains("trainer.bin of the checkpoint is 1 bytes too long"));
}

#[test]
fn rows_that_cannot_be_used_are_counted() {
    let base = base();
    let mut all = rows(&[6, 30, 7], 7);
    all[2].labels.fill(None);
    let spec = spec(&base, lora(), json!({"n_epochs": 1, "batch_size": 1, "max_seq_len": 20}));
    let (_, recorder) = finish(&base, &spec, &all, From::default());
    assert_eq!(recorder.metrics.len(), 1);
    assert_eq!(
        recorder.messages,
        [
            "1 of 3 training rows are left out: longer than 20 tokens",
            "1 of 3 training rows are left out: without a trained token"
        ]
    );
    let error = run(&base, &spec, &all[1..], From::default(), &mut Recorder::default()).unwrap_err();
    assert!(matches!(error, TrainError::Data(_)), "{error:?}");
}

#[test]
fn a_run_that_diverges_names_the_step() {
    let (base, rows) = (base(), rows(&[6], 8));
    let mut spec = spec(&base, lora(), json!({"n_epochs": 9, "batch_size": 1}));
    spec.training.learning_rate = 1e30;
    let error = run(&base, &spec, &rows, From::default(), &mut Recorder::default()).unwrap_err();
    let TrainError::Diverged(text) = error else { panic!("{error:?}") };
    assert!(text.contains("of step ") && text.contains("not finite"), "{text}");
}

#[test]
fn validation_stops_a_run_that_only_memorises() {
    let of = |examples: Vec<Example>| -> Vec<Row> { examples.into_iter().map(Row::from).collect() };
    let (base, train_rows, valid) = (base(), of(rows(&[9, 8], 9)), of(rows(&[7, 12, 5], 10)));
    let training = json!({"n_epochs": 60, "batch_size": 2, "learning_rate": 2e-2, "early_stopping": {"patience": 2}});
    let spec = spec(&base, json!({"r": 3, "alpha": 7}), training);
    let mut recorder = Recorder::default();
    let run = Run {
        spec: &spec,
        base: base.clone(),
        train: &train_rows,
        valid: &valid,
        resume: None,
        start: None,
        experts: &[],
        world: None,
        turns: None,
        tokenize: &|_| Ok(Vec::new()),
    };
    assert!(matches!(train(run, &mut recorder).unwrap(), Outcome::Finished { .. }));
    let losses: Vec<f64> = recorder.metrics.iter().map(|metrics| metrics.full_valid_loss.unwrap()).collect();
    let n = losses.len();
    assert!((3..60).contains(&n), "{n} steps");
    let best = losses[..n - 2].iter().copied().fold(f64::INFINITY, f64::min);
    assert!(losses[n - 2..].iter().all(|loss| *loss >= best), "{losses:?}");
    assert!(recorder.messages.iter().any(|text| text.contains("stopped early")));
    // The first batch of two holds fewer tokens than the set: another mean.
    assert_ne!(recorder.metrics[0].valid_loss, recorder.metrics[0].full_valid_loss);
}

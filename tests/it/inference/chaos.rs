//! Adapters whose files are deleted, replaced, damaged or late on their way: every request gets its own adapter's
//! answer or an error, never another's and never the base's. With a copy on disk and without.

use std::{sync::Arc, time::Duration};

use attune::{
    inference::{AdapterRef, CONFIG, DiskSettings, EngineError, EngineSettings, Handle, MANIFEST, Tier, WEIGHTS},
    storage::{BlobStore, Key},
};

use super::{Answer, Bench, ask, run, settings};
use crate::support::{
    chaotic::{Chaotic, Fault},
    tiny::Random,
};

fn chaotic(bench: &Bench, settings: EngineSettings) -> (Arc<Chaotic>, Handle) {
    let store = Arc::new(Chaotic::new(bench.store.clone()));
    let engine = Handle::start(bench.bases.clone(), store.clone(), tokio::runtime::Handle::current(), settings);
    (store, engine.unwrap())
}

fn with_disk(dir: &tempfile::TempDir, budget: u64) -> EngineSettings {
    EngineSettings { adapter_disk: Some(DiskSettings { dir: dir.path().to_owned(), budget }), ..settings() }
}

/// Waits until the last thread of an engine that ended has let go of the folder.
async fn released(dir: &tempfile::TempDir) {
    let lock = std::fs::File::open(dir.path().join("lock")).unwrap();
    while lock.try_lock().is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn key(adapter: &AdapterRef, name: &str) -> Key {
    Key::Adapter { generation: adapter.generation.clone(), name: name.to_owned() }
}

/// What each says alone, all different from each other and from the base.
async fn alone(bench: &Bench, adapters: &[AdapterRef]) -> Vec<Answer> {
    let mut all = vec![run(&bench.engine, ask(None, 7, 6)).await.ok()];
    for adapter in adapters {
        all.push(run(&bench.engine, ask(Some(adapter), 7, 6)).await.ok());
    }
    for (i, answer) in all.iter().enumerate() {
        assert!(all[..i].iter().all(|other| other.tokens != answer.tokens), "canaries that sing the same");
    }
    all.split_off(1)
}

/// Folders of the cache that are no adapter's.
fn halves(dir: &tempfile::TempDir) -> usize {
    let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().ends_with(".partial")).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_wrong_is_an_error_and_what_came_wrong_once_is_read_again() {
    let bench = Bench::start(settings()).await;
    let all = bench.several(2).await;
    let expected = alone(&bench, &all).await;
    let faults = |name: &str| {
        [
            (Fault::Flipped, true),
            (Fault::Truncated, true),
            (Fault::Longer, true),
            (Fault::Swapped(key(&all[1], name)), true),
            (Fault::BrokenOff, true),
            (Fault::Away, true),
            // Nothing says that it will come back.
            (Fault::Missing, false),
        ]
    };
    for name in [MANIFEST, CONFIG, WEIGHTS] {
        for (fault, passes) in faults(name) {
            // The same config is no fault: it is the same bytes.
            if name == CONFIG && matches!(fault, Fault::Swapped(_)) {
                continue;
            }
            for has_disk in [false, true] {
                let dir = tempfile::tempdir().unwrap();
                let settings = || if has_disk { with_disk(&dir, 1 << 20) } else { settings() };
                let end = format!("{}/{name}", all[0].generation);
                {
                    let (store, engine) = chaotic(&bench, settings());
                    store.set(&end, fault.clone(), usize::MAX);
                    let answer = run(&engine, ask(Some(&all[0]), 7, 6)).await;
                    let error = answer.error();
                    let fits = matches!(error, EngineError::Adapter(_) | EngineError::Unavailable(_));
                    assert!(fits && answer.tokens.is_empty(), "{name} {fault:?}: {answer:?}");
                    assert_eq!(run(&engine, ask(Some(&all[1]), 7, 6)).await, expected[1], "{name} {fault:?}");
                    engine.stop(Duration::ZERO).await;
                }
                if passes {
                    let (store, engine) = chaotic(&bench, settings());
                    store.set(&end, fault.clone(), 1);
                    assert_eq!(run(&engine, ask(Some(&all[0]), 7, 6)).await, expected[0], "{name} {fault:?} once");
                    engine.stop(Duration::ZERO).await;
                }
                if has_disk {
                    assert_eq!(halves(&dir), 0, "{name} {fault:?}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_copy_on_disk_serves_while_the_store_is_away() {
    let bench = Bench::start(settings()).await;
    let all = bench.several(2).await;
    let expected = alone(&bench, &all).await;
    let dir = tempfile::tempdir().unwrap();
    {
        let (_, engine) = chaotic(&bench, with_disk(&dir, 1 << 20));
        assert_eq!(engine.tier(&all[0].generation), Tier::Store);
        run(&engine, ask(Some(&all[0]), 7, 6)).await.ok();
        assert_eq!(engine.tier(&all[0].generation), Tier::Memory);
        assert!(engine.adapter_disk_bytes() > all[0].bytes);
        // Only one process has the folder.
        let (_, second) = chaotic(&bench, with_disk(&dir, 1 << 20));
        assert_eq!(run(&second, ask(Some(&all[1]), 7, 6)).await, expected[1]);
        assert_eq!(second.adapter_disk_bytes(), 0);
        second.stop(Duration::ZERO).await;
        engine.stop(Duration::ZERO).await;
    }
    released(&dir).await;
    // What a killed process left half written.
    let half = dir.path().join(format!("{}.partial", all[1].generation));
    std::fs::create_dir(&half).unwrap();
    std::fs::write(half.join(WEIGHTS), "half").unwrap();
    let (store, engine) = chaotic(&bench, with_disk(&dir, 1 << 20));
    assert_eq!(halves(&dir), 0);
    store.set("", Fault::Away, usize::MAX);
    assert_eq!(engine.tier(&all[0].generation), Tier::Disk);
    assert_eq!(run(&engine, ask(Some(&all[0]), 7, 6)).await, expected[0]);
    let error = run(&engine, ask(Some(&all[1]), 7, 6)).await.error();
    assert!(matches!(error, EngineError::Unavailable(_)), "{error}");
    engine.stop(Duration::ZERO).await;
    drop(engine);
    released(&dir).await;

    // A copy that was damaged is not used: with the store away that is an error, and else it comes again.
    let weights = dir.path().join(&all[0].generation).join(WEIGHTS);
    let mut bytes = std::fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    let (store, engine) = chaotic(&bench, with_disk(&dir, 1 << 20));
    store.set(WEIGHTS, Fault::Slow(Duration::from_millis(1)), usize::MAX);
    assert_eq!(run(&engine, ask(Some(&all[0]), 7, 6)).await, expected[0]);
    bytes[middle] ^= 1;
    assert_eq!(std::fs::read(&weights).unwrap(), bytes, "the copy is whole again");
    // Deleted, it is nowhere near any more.
    engine.evict(&all[0].generation);
    assert!(engine.tier(&all[0].generation) == Tier::Store && !weights.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_keeps_its_budget_and_what_is_used_often() {
    let bench = Bench::start(settings()).await;
    let all = bench.several(6).await;
    let dir = tempfile::tempdir().unwrap();
    let budget = 3 * all[0].bytes + 3 * 1024;
    // Memory for one: every change of adapter goes to the disk.
    let one = EngineSettings { adapter_budget_bytes: all[0].bytes * 3 / 2, ..with_disk(&dir, budget) };
    let (_, engine) = chaotic(&bench, one);
    let reads = |i: usize| bench.store.reads_of(&all[i].generation)[0];
    let before: Vec<usize> = (0..6).map(reads).collect();
    for i in [0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0] {
        run(&engine, ask(Some(&all[i]), 3, 2)).await.ok();
        assert!(engine.adapter_disk_bytes() <= budget, "{}", engine.adapter_disk_bytes());
    }
    let read: Vec<usize> = (0..6).map(|i| reads(i) - before[i]).collect();
    assert_eq!(read, [1; 6], "the one that is used all the time is read once");
    let on_disk = all.iter().filter(|adapter| engine.tier(&adapter.generation) != Tier::Store).count();
    assert_eq!(on_disk, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn pinned_adapters_stay_whoever_comes() {
    let bench = Bench::start(settings()).await;
    let all = bench.several(5).await;
    let dir = tempfile::tempdir().unwrap();
    let room = 2 * all[0].bytes + all[0].bytes / 2;
    let (_, engine) =
        chaotic(&bench, EngineSettings { adapter_budget_bytes: room, ..with_disk(&dir, 2 * all[0].bytes + 2 * 1024) });
    let dense = bench.bases.get("dense").unwrap().clone();
    engine.pin(&[(dense, all[0].clone())]);
    while engine.tier(&all[0].generation) != Tier::Memory {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let before = bench.store.reads_of(&all[0].generation);
    for _ in 0..3 {
        for adapter in &all[1..] {
            run(&engine, ask(Some(adapter), 3, 2)).await.ok();
            assert_eq!(engine.tier(&all[0].generation), Tier::Memory);
        }
    }
    run(&engine, ask(Some(&all[0]), 3, 2)).await.ok();
    assert_eq!(bench.store.reads_of(&all[0].generation), before);
    engine.pin(&[]);
    for adapter in all[1..].iter().cycle().take(40) {
        run(&engine, ask(Some(adapter), 3, 2)).await.ok();
    }
    assert_ne!(engine.tier(&all[0].generation), Tier::Memory, "it is let go like any other");
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_or_replaced_on_its_way_it_is_itself_or_an_error() {
    let bench = Bench::start(settings()).await;
    let all = bench.several(3).await;
    let expected = alone(&bench, &all).await;
    let (store, engine) = chaotic(&bench, settings());
    for adapter in &all[..2] {
        store.set(&format!("{}/{WEIGHTS}", adapter.generation), Fault::Slow(Duration::from_millis(3)), usize::MAX);
    }
    let waiting: Vec<_> = all[..2].iter().map(|adapter| engine.submit(ask(Some(adapter), 7, 6)).unwrap()).collect();
    bench.until(|_| engine.status().adapters == 2).await;
    // The first is deleted, the second gets the weights of the third.
    engine.evict(&all[0].generation);
    for name in [MANIFEST, CONFIG, WEIGHTS] {
        store.delete(&key(&all[0], name)).await.unwrap();
    }
    let other = bench.store.get(&key(&all[2], WEIGHTS)).await.unwrap();
    bench.store.put(&key(&all[1], WEIGHTS), other).await.unwrap();
    for (receiver, expected) in waiting.into_iter().zip(&expected) {
        let answer = super::collect(receiver).await;
        assert!(answer == *expected || answer.error().to_string().contains("store"), "{answer:?}");
    }
    let engine = bench.engine(settings());
    let error = run(&engine, ask(Some(&all[1]), 7, 6)).await.error();
    assert!(matches!(&error, EngineError::Adapter(why) if why.contains("damaged")), "{error}");
    assert_eq!(run(&engine, ask(Some(&all[2]), 7, 6)).await, expected[2]);
}

/// Many adapters, little room, and whatever can happen to a store, in an order that the seed gives.
#[tokio::test(flavor = "multi_thread")]
async fn in_a_storm_everybody_gets_their_own_or_an_error() {
    let bench = Bench::start(settings()).await;
    let all = bench.several(8).await;
    let expected = alone(&bench, &all).await;
    for seed in 0..3 {
        let mut random = Random(100 + seed);
        let dir = tempfile::tempdir().unwrap();
        let tight = EngineSettings {
            adapter_budget_bytes: 2 * all[0].bytes + 9,
            adapter_patience: Duration::from_secs(20),
            ..with_disk(&dir, 4 * all[0].bytes)
        };
        let (store, engine) = chaotic(&bench, tight);
        let (mut waiting, mut good, mut bad) = (Vec::new(), 0, 0);
        for round in 0..200 {
            let i = random.below(all.len());
            waiting.push((i, engine.submit(ask(Some(&all[i]), 7, 6)).unwrap()));
            match random.below(8) {
                0 | 6 | 7 => {
                    let other = key(&all[random.below(all.len())], WEIGHTS);
                    let faults = [Fault::Flipped, Fault::Truncated, Fault::Longer, Fault::Swapped(other), Fault::Away];
                    let fault = faults[random.below(faults.len())].clone();
                    let name = [MANIFEST, CONFIG, WEIGHTS, WEIGHTS, WEIGHTS][random.below(5)];
                    let end = format!("{}/{name}", all[random.below(all.len())].generation);
                    store.set(&end, fault, 1 + random.below(4));
                }
                1 => engine.evict(&all[random.below(all.len())].generation),
                2 => store.heal(),
                3 => waiting.truncate(waiting.len() - 1),
                4 => tokio::time::sleep(Duration::from_millis(random.below(20) as u64)).await,
                _ => {}
            }
            if round % 20 == 19 {
                for (i, receiver) in waiting.drain(..) {
                    let answer = super::collect(receiver).await;
                    match &answer.end {
                        Some(Ok(_)) => {
                            assert_eq!(answer, expected[i], "seed {seed}, round {round}");
                            good += 1;
                        }
                        _ => {
                            assert!(answer.tokens.is_empty(), "{answer:?}");
                            bad += 1;
                        }
                    }
                }
            }
            assert!(engine.status().adapter_bytes <= 2 * all[0].bytes + 9);
            assert!(engine.adapter_disk_bytes() <= 4 * all[0].bytes);
        }
        assert!(good > 40 && bad > 0, "{good} answers, {bad} errors: no storm");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_that_are_missing_are_not_all_remembered() {
    let bench = Bench::start(settings()).await;
    let good = bench.several(1).await.remove(0);
    for i in 0..1500 {
        let missing = AdapterRef { generation: format!("{i:064x}"), bytes: 10, virtual_tokens: 0 };
        let error = run(&bench.engine, ask(Some(&missing), 1, 1)).await.error();
        assert!(matches!(error, EngineError::Adapter(_)), "{error}");
    }
    run(&bench.engine, ask(Some(&good), 1, 1)).await.ok();
}

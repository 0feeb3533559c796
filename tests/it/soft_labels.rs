//! Labels that are true with a probability, as judges give them.

use attune::{
    data::{Example, Pair, Row},
    domain::{
        ObjectiveSpec, TrainSpec,
        spec::{DpoSpec, IpoSpec, OrpoSpec, RewardModelSpec, SimpoSpec},
    },
    model::Base,
    objectives::{
        dpo, ipo, orpo,
        preference::{Side, Verdict, softened},
        reward_model, simpo,
    },
};
use serde_json::json;

use crate::support::{
    tiny::{Random, Tiny},
    training::{From, finish, rows, spec},
};

#[test]
fn a_soft_label_weighs_both_orders() {
    let mut random = Random(11);
    let mut number = |scale: f64| -scale * f64::from(random.uniform()) - 0.1;
    let (dpo_spec, step) = (DpoSpec { beta: 0.7, ..DpoSpec::default() }, 1e-6);
    for p in [0.5, 0.8, 0.999] {
        let sides = [4.0, 7.0].map(|tokens| Side { log_prob: number(9.0), reference: number(9.0), tokens });
        let x = 0.7 * (sides[0].log_ratio() - sides[1].log_ratio());
        let log_sigmoid = |x: f64| -(1.0 + (-x).exp()).ln();
        let expected = -(p * log_sigmoid(x) + (1.0 - p) * log_sigmoid(-x));
        let found = softened(|sides| dpo::verdict(&dpo_spec, sides), sides, p).loss;
        assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        let judges: [&dyn Fn([Side; 2]) -> Verdict; 4] = [
            &|sides| dpo::verdict(&dpo_spec, sides),
            &|sides| ipo::verdict(&IpoSpec::default(), sides),
            &|sides| simpo::verdict(&SimpoSpec::default(), sides),
            &|sides| orpo::verdict(&OrpoSpec::default(), sides),
        ];
        for (i, judge) in judges.iter().enumerate() {
            for of in 0..2 {
                let moved = |by: f64| {
                    let mut sides = sides;
                    sides[of].log_prob += by;
                    softened(judge, sides, p)
                };
                let expected = (moved(step).loss - moved(-step).loss) / (2.0 * step);
                assert!((moved(0.0).slopes[of] - expected).abs() < 1e-5, "{i} {of}: {:?} {expected}", moved(0.0));
            }
        }
        let (model, scores) = (RewardModelSpec::default(), [number(3.0), number(3.0)]);
        let x = scores[0] - scores[1];
        let expected = -(p * log_sigmoid(x - 0.3) + (1.0 - p) * log_sigmoid(-x - 0.3));
        let found = reward_model::softened(&model, scores, 0.3, p);
        assert!((found.0 - expected).abs() < 1e-9, "{found:?} {expected}");
        for of in 0..2 {
            let moved = |by: f64| {
                let mut scores = scores;
                scores[of] += by;
                reward_model::softened(&model, scores, 0.3, p).0
            };
            assert!((found.1[of] - (moved(step) - moved(-step)) / (2.0 * step)).abs() < 1e-6, "{found:?}");
        }
    }
}

/// At the start, where policy and reference agree, the step is as long as the label is certain: 2p − 1.
#[test]
fn what_nobody_knows_teaches_nothing() {
    let dir = tempfile::tempdir().unwrap();
    Tiny::default().write(dir.path());
    let base = Base::open("tiny", dir.path()).unwrap();
    let texts = rows(&[9, 7, 6, 8], 3);
    let pairs = |probability: f64| -> Vec<Row> {
        let pair = |two: &[Example]| {
            let (chosen, rejected) = (two[0].clone(), two[1].clone());
            Row::Pair(Pair { chosen, rejected, margin: 0.0, probability })
        };
        texts.chunks(2).map(pair).collect()
    };
    let objective = ObjectiveSpec::from_json(&json!({"type": "dpo"})).unwrap();
    let training = json!({"max_steps": 1, "batch_size": 2});
    let task = TrainSpec { objective, ..spec(&base, json!({"type": "lora", "r": 3, "alpha": 7}), training) };
    let norm = |probability: f64| finish(&base, &task, &pairs(probability), From::default()).1.norms()[0];
    let certain = norm(1.0);
    assert!(certain > 1e-3);
    assert!(norm(0.5) < 1e-6 * certain, "{}", norm(0.5));
    assert!((norm(0.75) / certain - 0.5).abs() < 1e-4, "{} {certain}", norm(0.75));
}

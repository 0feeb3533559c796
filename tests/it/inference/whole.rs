//! Where a token sees those behind it, a text is read in one piece, whatever a step's limit, and never shared.

use attune::{
    domain::{MethodSpec, TaskHead, dataset::RowKind},
    inference::{EngineSettings, Output, Request, Task},
    methods::{self, score},
    model::{Batch, Sequence},
};
use candle_core::{Device, Tensor};
use serde_json::json;

use super::{Bench, ask, collect, settings};
use crate::support::{tiny::Random, training::create};

#[tokio::test(flavor = "multi_thread")]
async fn gates_of_a_whole_text_are_those_of_one_pass() {
    let bench = Bench::start(settings()).await;
    let base = bench.base("dense");
    let spec = json!({"type": "unipelt", "lora_r": 3, "prefix_length": 4, "gate_mode": "sequence_mean"});
    let labels = vec!["a".to_owned(), "b".to_owned()];
    let method = create(&MethodSpec::from_json(&spec).unwrap(), base, 1);
    let method = score::fresh(method, TaskHead::Sequence { labels }, base, 1).unwrap();
    let mut random = Random(6);
    for (_, variable) in method.variables() {
        let values: Vec<f32> = (0..variable.elem_count()).map(|_| 0.2 * random.normal()).collect();
        variable.set(&Tensor::from_vec(values, variable.shape(), &Device::Cpu).unwrap()).unwrap();
    }
    let files = method.export().unwrap();
    let (adapter, hook) = (bench.publish("dense", &files).await, methods::load(&files, base).unwrap());
    let classify = |n: usize| Request {
        task: Task::Classify { rows: RowKind::Labelled, spans: std::iter::once(0..n).collect() },
        logprobs: None,
        ..ask(Some(&adapter), n, 0)
    };
    let engine = bench.engine(EngineSettings { max_tokens_per_step: 7, ..settings() });
    // Twice the same text: what was read of the first is no use to the second.
    for n in [90, 5, 90, 33] {
        let request = classify(n);
        let sequences =
            vec![Sequence { tokens: &request.prompt, branches: &[], hook: Some(hook.clone()), cache: None }];
        let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
        let last = hidden.narrow(0, n - 1, 1).unwrap();
        let expected: Vec<f32> =
            base.logits(&last, Some(hook.as_ref())).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let speaking = engine.submit(ask(None, 20, 12)).unwrap();
        let mut receiver = engine.submit(request).unwrap();
        let mut found = None;
        while let Some(output) = receiver.recv().await {
            match output {
                Output::Scores { rows, .. } => found = Some(rows),
                Output::Done(_) => {}
                other => panic!("{other:?}"),
            }
        }
        let found = found.unwrap();
        let apart = found[0].iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(found.len() == 1 && apart < 1e-5, "{n}: {found:?} {expected:?}");
        assert_eq!(collect(speaking).await.ok().tokens.len(), 12);
    }
}

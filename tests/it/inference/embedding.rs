//! Hidden states as one vector.

use attune::{
    inference::{EngineSettings, Output, Pooling, Request, Task},
    model::{Batch, Sequence},
};

use super::{Bench, ask, settings};

async fn vector(engine: &attune::inference::Handle, request: Request) -> Vec<f32> {
    match engine.submit(request).unwrap().recv().await {
        Some(Output::Embedding(vector)) => vector,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vector_pools_the_hidden_states_of_its_tokens() {
    let bench = Bench::start(settings()).await;
    let base = bench.base("dense");
    let embed = |pooling| Request { task: Task::Embed(pooling), ..ask(None, 37, 0) };
    let prompt = embed(Pooling::Mean).prompt;
    let sequences = vec![Sequence { tokens: &prompt, branches: &[], hook: None, cache: None }];
    let rows: Vec<Vec<f32>> = base.forward(&mut Batch { sequences, train: None }).unwrap().to_vec2().unwrap();
    let mean = |i: usize| rows.iter().map(|row| row[i]).sum::<f32>();
    let (sum, last) =
        (vector(&bench.engine, embed(Pooling::Mean)).await, vector(&bench.engine, embed(Pooling::Last)).await);
    assert_eq!((sum.len(), last.len()), (64, 64));
    for i in 0..64 {
        assert!((sum[i] - mean(i)).abs() < 1e-3, "{i}: {} is not {}", sum[i], mean(i));
        assert!((last[i] - rows[36][i]).abs() < 1e-4, "{i}: {} is not {}", last[i], rows[36][i]);
    }
    // In pieces, beside others, and with an adapter.
    let adapter = bench.several(1).await.remove(0);
    let engine = bench.engine(EngineSettings { max_tokens_per_step: 5, ..settings() });
    let others: Vec<_> = (0..3).map(|i| engine.submit(ask(Some(&adapter), 9 + i, 30)).unwrap()).collect();
    assert_eq!(vector(&engine, embed(Pooling::Mean)).await, sum);
    let tuned = vector(&engine, Request { adapter: Some(adapter.clone()), ..embed(Pooling::Mean) }).await;
    assert_ne!(tuned, sum);
    drop(others);
}

//! Activation checkpointing with a hook that uses every way into a layer at once.

use std::{collections::BTreeMap, sync::Arc};

use attune::{
    domain::{Site, rng::Stream},
    model::{At, Base, Batch, Hook, Keep, Linear, Sequence, Taken, Tape, Target},
};
use candle_core::{Device, Result, Tensor, Var};

use crate::support::tiny::{Random, Tiny};

const PREFIX: usize = 3;

/// Prompt rows and prefixes that come out of one shared matrix, low-rank changes with dropout, and a penalty taken
/// from inside each layer.
struct Busy {
    variables: Arc<BTreeMap<String, Var>>,
    encoded: Tensor,
    penalties: Taken,
}

fn variable(rows: usize, cols: usize, seed: u64) -> Var {
    let mut random = Random(seed);
    let values: Vec<f32> = (0..rows * cols).map(|_| 0.3 * random.normal()).collect();
    Var::from_vec(values, (rows, cols), &Device::Cpu).unwrap()
}

impl Busy {
    fn new(variables: &Arc<BTreeMap<String, Var>>) -> Self {
        let encoded = variables["table"].matmul(variables["encoder"].as_tensor()).unwrap().tanh().unwrap();
        Self { variables: variables.clone(), encoded, penalties: Taken::default() }
    }

    fn variables() -> Arc<BTreeMap<String, Var>> {
        let mut all = BTreeMap::from([
            ("table".to_owned(), variable(PREFIX, 8, 1)),
            ("encoder".to_owned(), variable(8, 64 + 2 * 2 * 32, 2)),
        ]);
        for layer in 0..2 {
            all.insert(format!("a{layer}"), variable(4, 64, 10 + layer));
            all.insert(format!("b{layer}"), variable(96, 4, 20 + layer));
            all.insert(format!("router{layer}"), variable(64, 2, 30 + layer));
        }
        Arc::new(all)
    }
}

impl Hook for Busy {
    fn virtual_tokens(&self) -> usize {
        PREFIX
    }

    fn embed(&self, _: &[u32], _: bool, x: Tensor) -> Result<Tensor> {
        Tensor::cat(&[&self.encoded.narrow(1, 0, 64)?.contiguous()?, &x], 0)
    }

    fn prefix(&self, layer: usize) -> Result<Option<(Tensor, Tensor)>> {
        let part = |i| self.encoded.narrow(1, 64 + 32 * (2 * layer + i), 32)?.contiguous();
        Ok(Some((part(0)?, part(1)?)))
    }

    fn prefix_len(&self) -> usize {
        PREFIX
    }

    fn linear(&self, at: At, site: Site, x: &Tensor, base: &Linear) -> Result<Tensor> {
        if site != Site::Up {
            return base.forward(x);
        }
        let scores = x.matmul(self.variables[&format!("router{}", at.layer)].as_tensor())?;
        self.penalties.push(scores.sqr()?.mean_all()?);
        let stream = Stream::new(at.train.unwrap(), at.layer as u64);
        let mask: Vec<f32> = stream.uniforms(x.elem_count()).map(|u| if u < 0.3 { 0.0 } else { 1.4 }).collect();
        let x = (x * Tensor::from_vec(mask, x.shape(), x.device())?)?;
        let of = |name: &str| self.variables[&format!("{name}{}", at.layer)].as_tensor().clone();
        base.forward_low_rank(&x, &of("a"), &of("b"), 1.7)
    }

    fn taken(&self) -> Option<&Taken> {
        Some(&self.penalties)
    }

    fn penalty(&self) -> Result<Option<Tensor>> {
        // Not a sum over layers.
        self.penalties.all().into_iter().reduce(|a, b| (a * b).unwrap()).map(|all| all.sqrt()).transpose()
    }
}

/// The loss and every gradient, by name.
fn gradients(base: &Base, keep: Keep, with_penalty: bool) -> (f32, BTreeMap<String, Vec<f32>>) {
    let variables = Busy::variables();
    let (a, b) = (Busy::new(&variables), Busy::new(&variables));
    let tokens: [&[u32]; 3] = [&[5, 9, 200, 31, 7], &[1, 2, 3], &[77, 78, 79, 80]];
    let mut tape = Tape::new(keep);
    let mut loss = Tensor::zeros((), candle_core::DType::F32, &Device::Cpu).unwrap();
    // Two passes behind one loss, as objectives on pairs have them.
    for (hook, tokens) in [(a, &tokens[..2]), (b, &tokens[2..])] {
        let hook: Arc<dyn Hook> = Arc::new(hook);
        let sequences =
            tokens.iter().map(|tokens| Sequence { tokens, branches: &[], hook: Some(hook.clone()), cache: None });
        let hidden = tape.forward(base, Batch { sequences: sequences.collect(), train: Some(3) }).unwrap();
        let rows = hidden.dim(0).unwrap();
        let targets: Vec<Target> =
            (0..rows).map(|row| Target { row, token: (row * 31 % 250) as u32, weight: 0.5 }).collect();
        let part = base.cross_entropy(&hidden, &targets, None).unwrap().loss;
        loss = (loss + part).unwrap();
        if with_penalty {
            loss = (loss + hook.penalty().unwrap().unwrap() * 3.0).unwrap();
        }
    }
    let mut sums: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    tape.backward(base, &loss, |found| {
        for (name, variable) in variables.iter() {
            let Some(gradient) = found.get(variable.as_tensor()) else { continue };
            let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
            let sum = sums.entry(name.clone()).or_insert_with(|| vec![0.0; gradient.len()]);
            sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
        }
        Ok(())
    })
    .unwrap();
    (loss.to_scalar().unwrap(), sums)
}

#[test]
fn a_layer_run_again_gives_the_same_gradients() {
    let dir = tempfile::tempdir().unwrap();
    Tiny::default().write(dir.path());
    let base = Base::open("tiny", dir.path()).unwrap();
    for with_penalty in [false, true] {
        let (whole_loss, whole) = gradients(&base, Keep::Everything, with_penalty);
        let (loss, again) = gradients(&base, Keep::LayerInputs, with_penalty);
        assert_eq!(loss, whole_loss);
        let trained: Vec<&String> = whole.keys().collect();
        assert_eq!(trained, again.keys().collect::<Vec<_>>());
        assert_eq!(trained.len(), if with_penalty { 8 } else { 6 }, "{trained:?}");
        for (name, whole) in &whole {
            let again = &again[name];
            let largest = whole.iter().fold(0f32, |most, g| most.max(g.abs()));
            let apart = whole.iter().zip(again).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            // Within a layer the numbers and their order are the same. Two passes of one loss, and a penalty from
            // inside a layer, are added in another order.
            let is_exact = name.starts_with(['a', 'b', 'r']) && !with_penalty;
            assert!(apart <= if is_exact { 0.0 } else { 1e-5 * largest }, "{name}: {apart} of {largest}");
            assert!(largest > 1e-4, "{name}");
        }
    }
}

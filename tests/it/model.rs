//! The decoder on small random models: rows do not depend on the batch, caches on how they were filled,
//! and every hook is called, forward and backward.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use attune::{
    domain::Site,
    model::{
        At, Base, Batch, Frozen, Hook, Linear, Replaced, Sequence, SequenceCache, Target,
        mlp::{Mlp, Products},
    },
};
use candle_core::{DType, Device, Result, Tensor, Var};
use serde_json::json;

use crate::support::tiny::{Random, Tiny, VOCAB};

const CPU: Device = Device::Cpu;

fn open(tiny: &Tiny) -> Arc<Base> {
    let dir = tempfile::tempdir().unwrap();
    tiny.write(dir.path());
    Base::open("tiny", dir.path()).unwrap()
}

fn ids(n: usize, seed: u64) -> Vec<u32> {
    let mut random = Random(seed);
    (0..n).map(|_| random.below(VOCAB) as u32).collect()
}

fn noise(rows: usize, cols: usize, std: f32, seed: u64) -> Tensor {
    let mut random = Random(seed);
    Tensor::from_vec((0..rows * cols).map(|_| std * random.normal()).collect::<Vec<_>>(), (rows, cols), &CPU).unwrap()
}

/// Made for `context` positions, lengthened to 512.
fn longrope(context: usize) -> serde_json::Value {
    let factors = |first: f64| (0..8).map(|i| first + f64::from(i) / 4.0).collect::<Vec<_>>();
    json!({"original_max_position_embeddings": context,
           "rope_scaling": {"type": "su", "short_factor": factors(1.0), "long_factor": factors(2.0)}})
}

fn families() -> Vec<Tiny> {
    let window = json!({"sliding_window": 5});
    let gemma = json!({"sliding_window": 5, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24,
                       "hidden_act": null, "hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 100.0});
    let llama3 = json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}});
    vec![
        Tiny::default(),
        Tiny { tied: false, extra: llama3, ..Tiny::default() },
        Tiny { model_type: "mistral", extra: window, ..Tiny::default() },
        Tiny { model_type: "qwen2", layers: 3, ..Tiny::default() },
        Tiny { model_type: "qwen3", head_dim: 32, ..Tiny::default() },
        Tiny { model_type: "gemma3_text", layers: 3, extra: gemma, ..Tiny::default() },
        Tiny { model_type: "phi3", tied: false, extra: longrope(256), ..Tiny::default() },
    ]
}

/// Hidden rows of one sequence without a cache.
fn alone(base: &Base, tokens: &[u32], hook: Option<Arc<dyn Hook>>) -> Vec<Vec<f32>> {
    let sequences = vec![Sequence { tokens, branches: &[], hook, cache: None }];
    base.forward(&mut Batch { sequences, train: None }).unwrap().to_vec2().unwrap()
}

/// The same through a cache, in pieces.
fn in_pieces(base: &Base, tokens: &[u32], pieces: &[usize], hook: Option<Arc<dyn Hook>>) -> Vec<Vec<f32>> {
    let (mut cache, mut rows, mut at) = (base.new_cache(), Vec::new(), 0);
    for n in pieces {
        let sequences =
            vec![Sequence { tokens: &tokens[at..at + n], branches: &[], hook: hook.clone(), cache: Some(&mut cache) }];
        rows.extend(base.forward(&mut Batch { sequences, train: None }).unwrap().to_vec2::<f32>().unwrap());
        at += n;
        assert_eq!(cache.len(), at);
    }
    rows
}

#[test]
fn a_cache_changes_no_bit_in_any_family() {
    for tiny in families() {
        let base = open(&tiny);
        let tokens = ids(40, 3);
        let whole = alone(&base, &tokens, None);
        assert_eq!(in_pieces(&base, &tokens, &[7, 1, 1, 30, 1], None), whole, "{}", tiny.model_type);
        assert!(whole.iter().flatten().all(|x| x.is_finite()));
    }
}

#[test]
fn a_batch_changes_no_bit() {
    let base = open(&Tiny::default());
    let hooks: Vec<Option<Arc<dyn Hook>>> = vec![None, Some(adapter(&base, 1)), Some(adapter(&base, 2)), None];
    let tokens: Vec<Vec<u32>> = [9, 33, 1, 14].iter().map(|n| ids(*n, *n as u64)).collect();
    let mut caches: Vec<SequenceCache> = tokens.iter().map(|_| base.new_cache()).collect();
    let before = base.forward_count();
    let sequences = (tokens.iter().zip(&hooks).zip(&mut caches))
        .map(|((tokens, hook), cache)| Sequence { tokens, branches: &[], hook: hook.clone(), cache: Some(cache) })
        .collect();
    let together: Vec<Vec<f32>> = base.forward(&mut Batch { sequences, train: None }).unwrap().to_vec2().unwrap();
    assert_eq!(base.forward_count() - before, 1);
    let separate: Vec<Vec<f32>> =
        tokens.iter().zip(&hooks).flat_map(|(tokens, hook)| alone(&base, tokens, hook.clone())).collect();
    assert_eq!(together, separate);
    assert_ne!(alone(&base, &tokens[1], None), alone(&base, &tokens[1], hooks[1].clone()), "the adapter acts");
}

#[test]
fn later_tokens_do_not_reach_back() {
    for tiny in families() {
        let base = open(&tiny);
        let mut tokens = ids(12, 4);
        let before = alone(&base, &tokens, None);
        tokens[11] = (tokens[11] + 1) % VOCAB as u32;
        let after = alone(&base, &tokens, None);
        assert_eq!(before[..11], after[..11]);
        assert_ne!(before[11], after[11]);
    }
}

/// Low-rank changes on every linear, random.
struct LowRank(Vec<(Tensor, Tensor)>);

fn adapter(base: &Base, seed: u64) -> Arc<dyn Hook> {
    let changes = base.info.linears().enumerate().map(|(i, (_, site))| {
        let (out, input) = base.info.shape(site);
        (noise(4, input, 0.1, seed * 1000 + i as u64), noise(out, 4, 0.1, seed * 2000 + i as u64))
    });
    Arc::new(LowRank(changes.collect()))
}

impl Hook for LowRank {
    fn linear(&self, at: At, site: Site, x: &Tensor, base: &Linear) -> Result<Tensor> {
        let (a, b) = &self.0[at.layer * 7 + site as usize];
        base.forward_low_rank(x, a, b, 0.7)
    }

    fn adjust(&self, at: At, site: Site, x: &Tensor, y: Tensor, _: &Linear) -> Result<Tensor> {
        let (a, b) = &self.0[at.layer * 7 + site as usize];
        y + attune::model::ops::low_rank_delta(x, a, b, 0.7)?
    }
}

/// One hook each, with a variable whose gradient shows that it was called.
macro_rules! hook_with {
    ($name:ident, $($body:tt)*) => {
        struct $name(Var);
        impl Hook for $name {
            $($body)*
        }
    };
}

hook_with! { Embed,
    fn virtual_tokens(&self) -> usize {
        3
    }
    fn embed(&self, _: &[u32], is_start: bool, x: Tensor) -> Result<Tensor> {
        if is_start { Tensor::cat(&[self.0.as_tensor(), &x], 0) } else { Ok(x) }
    }
}
hook_with! { Adjust,
    fn adjust(&self, at: At, site: Site, _: &Tensor, y: Tensor, _: &Linear) -> Result<Tensor> {
        if at.layer == 0 && site == Site::Up { y.broadcast_add(&self.0) } else { Ok(y) }
    }
}
hook_with! { Kv,
    fn kv(&self, _: At, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        Ok((k.broadcast_mul(&self.0)?, v.broadcast_mul(&self.0)?))
    }
}
hook_with! { Prefix,
    fn prefix(&self, layer: usize) -> Result<Option<(Tensor, Tensor)>> {
        let rows = (self.0.as_tensor() * (1.0 + layer as f64))?;
        Ok(Some((rows.clone(), (rows * 0.5)?)))
    }
    fn prefix_len(&self) -> usize {
        4
    }
}
hook_with! { Gate,
    fn prefix(&self, _: usize) -> Result<Option<(Tensor, Tensor)>> {
        let rows = noise(4, 32, 0.8, 5);
        Ok(Some((rows.clone(), rows)))
    }
    fn prefix_len(&self) -> usize {
        4
    }
    fn shifts_positions(&self) -> bool {
        false
    }
    fn gate(&self, _: At, x: &Tensor) -> Result<Option<Tensor>> {
        candle_nn::ops::sigmoid(&x.broadcast_mul(&self.0)?.sum_keepdim(1)?).map(Some)
    }
}
hook_with! { Act,
    fn act(&self, _: At, z: Tensor) -> Result<Tensor> {
        z.broadcast_mul(&self.0)
    }
}
hook_with! { OwnMlp,
    fn mlp(&self, at: At, x: &Tensor, frozen: &Products, mlp: &Mlp) -> Result<Option<Replaced<'_>>> {
        if at.layer != 0 {
            return Ok(None);
        }
        let z = mlp.activate(&(&frozen.gate + x.sum_keepdim(1)?.broadcast_as(frozen.gate.shape())?)?, &frozen.up)?;
        Ok(Some(Replaced { z, finish: Box::new(|y| y.broadcast_mul(&self.0)) }))
    }
}
hook_with! { After,
    fn after(&self, _: At, x: &Tensor, m: Tensor) -> Result<Tensor> {
        m + x.broadcast_mul(&self.0)?
    }
}
hook_with! { Head,
    fn head(&self, x: &Tensor, base: &Linear) -> Result<Option<Tensor>> {
        base.forward(&x.broadcast_mul(&self.0)?).map(Some)
    }
}

type Made = (&'static str, Var, Arc<dyn Hook>);

fn every_hook() -> Vec<Made> {
    let around = |rows: usize, cols: usize, mean: f64, seed: u64| {
        Var::from_tensor(&(noise(rows, cols, 0.5, seed) + mean).unwrap()).unwrap()
    };
    macro_rules! made {
        ($($hook:ident($rows:expr, $cols:expr, $mean:expr)),*) => {
            vec![$({
                let var = around($rows, $cols, $mean, $cols as u64);
                (stringify!($hook), var.clone(), Arc::new($hook(var)) as Arc<dyn Hook>)
            }),*]
        };
    }
    made![
        Embed(3, 64, 0.0),
        Adjust(1, 96, 0.0),
        Kv(1, 32, 1.0),
        Prefix(4, 32, 0.0),
        Gate(1, 64, 0.0),
        Act(1, 96, 1.0),
        OwnMlp(1, 64, 1.0),
        After(1, 64, 0.0),
        Head(1, 64, 1.0)
    ]
}

fn loss(base: &Base, sequences: &[Vec<u32>], hook: &Arc<dyn Hook>) -> Tensor {
    let rows = sequences
        .iter()
        .map(|tokens| Sequence { tokens, branches: &[], hook: Some(hook.clone()), cache: None })
        .collect();
    let hidden = base.forward(&mut Batch { sequences: rows, train: None }).unwrap();
    let mut start = 0;
    let mut targets = Vec::new();
    for tokens in sequences {
        targets.extend((1..tokens.len()).map(|i| Target { row: start + i - 1, token: tokens[i], weight: 1.0 }));
        start += tokens.len();
    }
    base.cross_entropy(&hidden, &targets, Some(hook.as_ref())).unwrap().loss
}

#[test]
fn every_hook_acts_and_takes_a_gradient() {
    let base = open(&Tiny::default());
    let sequences = [ids(6, 1), ids(11, 2)];
    let frozen: Arc<dyn Hook> = Arc::new(Frozen);
    let plain = loss(&base, &sequences, &frozen).to_scalar::<f32>().unwrap();
    for (name, var, hook) in every_hook() {
        let with = loss(&base, &sequences, &hook);
        assert_ne!(with.to_scalar::<f32>().unwrap(), plain, "{name} does nothing");
        let gradients = with.backward().unwrap();
        let gradient = gradients.get(&var).unwrap_or_else(|| panic!("{name} has no gradient"));
        // A step along the gradient changes the loss as the gradient says.
        let square = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(square > 0.0, "{name}: the gradient is zero");
        let step = 2e-3 / square.sqrt();
        let old = var.as_tensor().copy().unwrap();
        let at = |sign: f64| {
            var.set(&(&old + (gradient * (sign * f64::from(step))).unwrap()).unwrap()).unwrap();
            f64::from(loss(&base, &sequences, &hook).to_scalar::<f32>().unwrap())
        };
        let slope = (at(1.0) - at(-1.0)) / (2.0 * f64::from(step));
        assert!((slope / f64::from(square) - 1.0).abs() < 0.05, "{name}: slope {slope}, gradient² {square}");
    }
}

/// The hidden rows of three texts that begin alike: their start read once, or with each of them.
fn alike(base: &Base, hook: &Arc<dyn Hook>, is_shared: bool) -> Tensor {
    let (start, ends) = (ids(7, 1), [ids(5, 2), ids(1, 3), ids(38, 4)]);
    let (all, branches) = ([start.clone(), ends.concat()].concat(), ends.each_ref().map(Vec::len));
    let texts = ends.map(|end| [start.clone(), end].concat());
    let sequence = |tokens, branches| Sequence { tokens, branches, hook: Some(hook.clone()), cache: None };
    let other = ids(4, 5);
    let mut sequences = vec![sequence(&other, &[])];
    match is_shared {
        true => sequences.push(sequence(&all, &branches)),
        false => sequences.extend(texts.iter().map(|text| sequence(text, &[]))),
    }
    let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
    if !is_shared {
        return hidden;
    }
    let mut end = 11;
    let texts = branches.iter().flat_map(|n| {
        end += *n as u32;
        (4..11).chain(end - *n as u32..end).collect::<Vec<u32>>()
    });
    let rows: Vec<u32> = (0..4).chain(texts).collect();
    hidden.index_select(&Tensor::new(rows, &CPU).unwrap(), 0).unwrap()
}

fn largest(x: &Tensor) -> f32 {
    x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

#[test]
fn a_start_that_is_shared_is_as_one_that_is_not() {
    let frozen: Arc<dyn Hook> = Arc::new(Frozen);
    for tiny in families().into_iter().filter(|tiny| tiny.model_type != "phi3") {
        let base = open(&tiny);
        let [shared, apart] = [true, false].map(|is_shared| alike(&base, &frozen, is_shared));
        assert!(largest(&(shared - &apart).unwrap()) < 1e-4 * largest(&apart), "{}", tiny.model_type);
    }
    let base = open(&Tiny::default());
    for (name, var, hook) in every_hook() {
        let [shared, apart] = [true, false].map(|is_shared| {
            let hidden = alike(&base, &hook, is_shared);
            let weights = noise(hidden.dim(0).unwrap(), 64, 1.0, 8);
            let gradients = (hidden * weights).unwrap().sum_all().unwrap().backward().unwrap();
            gradients.get(&var).cloned()
        });
        // The output layer's hook is behind the rows.
        let (Some(shared), Some(apart)) = (shared, apart) else {
            assert_eq!(name, "Head");
            continue;
        };
        assert!(largest(&apart) > 0.0, "{name}");
        assert!(largest(&(shared - &apart).unwrap()) < 1e-4 * largest(&apart), "{name}");
    }
}

#[test]
fn branches_have_their_limits() {
    let base = open(&Tiny::default());
    let tokens = ids(5, 1);
    let mut cache = base.new_cache();
    let refused = |branches, cache| {
        let sequences = vec![Sequence { tokens: &tokens, branches, hook: None, cache }];
        base.forward(&mut Batch { sequences, train: None }).unwrap_err().to_string()
    };
    assert!(refused(&[2, 3], None).contains("5 rows cannot have branches of 5"));
    assert!(refused(&[2], Some(&mut cache)).contains("branches of 2"));
}

#[test]
fn every_hook_serves_from_a_cache_beside_others() {
    let base = open(&Tiny::default());
    let tokens = ids(13, 9);
    for (name, _, hook) in every_hook() {
        let whole = alone(&base, &tokens, Some(hook.clone()));
        let pieces = in_pieces(&base, &tokens, &[5, 1, 7], Some(hook.clone()));
        // Row by row beside an adapter of another kind and the bare base.
        let (others, mut caches) = (ids(4, 7), [base.new_cache(), base.new_cache(), base.new_cache()]);
        let [a, b, c] = &mut caches;
        let sequences = vec![
            Sequence { tokens: &others, branches: &[], hook: Some(adapter(&base, 3)), cache: Some(a) },
            Sequence { tokens: &tokens, branches: &[], hook: Some(hook), cache: Some(b) },
            Sequence { tokens: &others, branches: &[], hook: None, cache: Some(c) },
        ];
        let mixed: Vec<Vec<f32>> = base.forward(&mut Batch { sequences, train: None }).unwrap().to_vec2().unwrap();
        for (row, (x, (y, z))) in whole.iter().zip(pieces.iter().zip(&mixed[4..])).enumerate() {
            let far = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(far(x, y) < 2e-5 && far(x, z) < 2e-5, "{name}, row {row}: {} {}", far(x, y), far(x, z));
        }
        assert_eq!(mixed[..4], alone(&base, &others, Some(adapter(&base, 3)))[..]);
        assert_eq!(mixed[17..], alone(&base, &others, None)[..]);
    }
}

#[test]
fn layer_zero_learns_through_every_layer() {
    let base = open(&Tiny { layers: 3, ..Tiny::default() });
    let (out, input) = base.info.shape(Site::Q);
    let (a, b) = (Var::from_tensor(&noise(3, input, 0.2, 1)).unwrap(), Var::zeros((out, 3), DType::F32, &CPU).unwrap());
    struct First(Var, Var);
    impl Hook for First {
        fn linear(&self, at: At, site: Site, x: &Tensor, base: &Linear) -> Result<Tensor> {
            if at.layer != 0 || site != Site::Q {
                return base.forward(x);
            }
            base.forward_low_rank(x, &self.0, &self.1, 1.5)
        }
    }
    let hook: Arc<dyn Hook> = Arc::new(First(a, b.clone()));
    let gradients = loss(&base, &[ids(9, 1)], &hook).backward().unwrap();
    let largest = gradients.get(&b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(largest > 1e-6, "{largest}");
}

fn broken(change: impl Fn(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    Tiny::default().write(dir.path());
    change(dir.path());
    Base::open("tiny", dir.path()).err().unwrap().to_string()
}

fn edit_config(dir: &Path, key: &str, value: serde_json::Value) {
    let path: PathBuf = dir.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config[key] = value;
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn models_that_do_not_fit_are_refused_by_what_is_wrong() {
    let shape = broken(|dir| edit_config(dir, "intermediate_size", json!(128)));
    assert!(shape.contains("mlp.gate_proj.weight") && shape.contains("128"), "{shape}");
    let missing = broken(|dir| edit_config(dir, "num_hidden_layers", json!(3)));
    assert!(missing.contains("model.layers.2.input_layernorm.weight is missing"), "{missing}");
    let family = broken(|dir| edit_config(dir, "model_type", json!("gpt2")));
    assert!(family.contains("gpt2") && family.contains("llama"), "{family}");
    let huge = broken(|dir| edit_config(dir, "num_hidden_layers", json!(1u64 << 40)));
    assert!(huge.contains("2^24"), "{huge}");
    let rope = broken(|dir| edit_config(dir, "rope_scaling", json!({"rope_type": "yarn", "factor": 2.0})));
    assert!(rope.contains("yarn"), "{rope}");
    let base = open(&Tiny { context: 16, ..Tiny::default() });
    let tokens = ids(17, 1);
    let sequences = vec![Sequence { tokens: &tokens, branches: &[], hook: None, cache: None }];
    let error = base.forward(&mut Batch { sequences, train: None }).unwrap_err().to_string();
    assert!(error.contains("17 of 16"), "{error}");
    let error = base.embed(&[VOCAB as u32]).unwrap_err().to_string();
    assert!(error.contains("vocabulary"), "{error}");
}

/// LongRoPE turns a sequence by its whole length, so none may cross the line with rows in a cache.
#[test]
fn a_lengthened_context_begins_anew() {
    let base = open(&Tiny { model_type: "phi3", extra: longrope(16), ..Tiny::default() });
    assert_eq!([1, 16, 17, 512].map(|prompt| base.info.longest(prompt)), [16, 16, 512, 512]);
    let tokens = ids(40, 3);
    assert_eq!(in_pieces(&base, &tokens[..16], &[7, 9], None), alone(&base, &tokens[..16], None));
    assert_eq!(in_pieces(&base, &tokens, &[17, 20, 3], None), alone(&base, &tokens, None));
    let (short, long) = (alone(&base, &tokens[..16], None), alone(&base, &tokens[..17], None));
    assert_ne!(short[15], long[15]);
    let mut cache = base.new_cache();
    for (piece, is_refused) in [(&tokens[..16], false), (&tokens[16..17], true)] {
        let sequences = vec![Sequence { tokens: piece, branches: &[], hook: None, cache: Some(&mut cache) }];
        let answer = base.forward(&mut Batch { sequences, train: None });
        assert_eq!(answer.is_err_and(|error| error.to_string().contains("began within 16 positions")), is_refused);
    }
}

#[test]
fn what_a_family_has_and_we_have_not_is_refused_by_name() {
    let refusal = |model_type, extra| {
        let dir = tempfile::tempdir().unwrap();
        Tiny { model_type, extra, ..Tiny::default() }.write(dir.path());
        Base::open("tiny", dir.path()).err().unwrap().to_string()
    };
    for (model_type, extra, named) in [
        ("gemma3", json!({}), "gemma3_text"),
        ("gemma3_text", json!({"final_logit_softcapping": 30.0}), "final_logit_softcapping"),
        ("gemma3_text", json!({"layer_types": ["full_attention"]}), "layer_types"),
        ("llama", json!({"hidden_act": "relu"}), "relu"),
        ("phi3", json!({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}), "original_max"),
        (
            "phi3",
            json!({"original_max_position_embeddings": 16,
                        "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": []}}),
            "1 short and 0",
        ),
    ] {
        let text = refusal(model_type, extra);
        assert!(text.contains(named), "{named}: {text}");
    }
}

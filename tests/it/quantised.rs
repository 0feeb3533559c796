//! Training over every storage of a base, and what a base in 4 bits takes in memory.

use std::{collections::HashMap, fs, path::Path, process::Command, sync::Arc};

use attune::{
    domain::{MethodSpec, Site},
    model::{Base, Batch, Held, Sequence, Target},
};
use candle_core::{DType, Device, Tensor, quantized::GgmlDType, safetensors};
use serde_json::json;

use crate::support::{
    quantised,
    tiny::{Random, Tiny, VOCAB},
    training::create,
};

/// Rows are whole blocks of every format.
fn tiny() -> Tiny {
    Tiny { hidden: 256, intermediate: 512, head_dim: 64, ..Tiny::default() }
}

/// Each base by how it is held.
fn bases(dir: &Path) -> Vec<Arc<Base>> {
    tiny().write(dir);
    let formats = [
        (GgmlDType::F16, "F16"),
        (GgmlDType::BF16, "BF16"),
        (GgmlDType::Q4_0, "Q4_0"),
        (GgmlDType::Q4_1, "Q4_1"),
        (GgmlDType::Q5_0, "Q5_0"),
        (GgmlDType::Q5_1, "Q5_1"),
        (GgmlDType::Q8_0, "Q8_0"),
        (GgmlDType::Q4K, "Q4_K"),
        (GgmlDType::Q5K, "Q5_K"),
        (GgmlDType::Q6K, "Q6_K"),
    ];
    let open = |id: &str, path: &Path, held| Base::open_held(id, path, held).unwrap();
    let mut bases: Vec<Arc<Base>> = formats
        .into_iter()
        .map(|(dtype, name)| {
            let path = dir.join(format!("{name}.gguf"));
            quantised::write(&tiny(), &path, dtype);
            open(name, &path, Held::AsStored)
        })
        .collect();
    // From safetensors and from GGUF, whose rows of queries and keys stand in another order.
    bases.extend([
        open("NF4", dir, Held::Nf4),
        open("NF4-DQ", dir, Held::Nf4Dq),
        open("NF4", &dir.join("F16.gguf"), Held::Nf4),
    ]);
    bases
}

/// The same numbers as a dense model.
fn dense(base: &Base, dir: &Path) -> Arc<Base> {
    let to = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(dir.join(file), to.path().join(file)).unwrap();
    }
    let mut tensors: HashMap<String, Tensor> = safetensors::load(dir.join("model.safetensors"), &Device::Cpu).unwrap();
    for (layer, site) in base.info.linears() {
        let name = format!("{}.weight", site.path(layer));
        assert!(tensors.insert(name, base.linear(layer, site).dequantize().unwrap()).is_some());
    }
    let ids: Vec<u32> = (0..VOCAB as u32).collect();
    tensors.insert("model.embed_tokens.weight".into(), base.embed(&ids).unwrap());
    safetensors::save(&tensors, to.path().join("model.safetensors")).unwrap();
    Base::open("dense", to.path()).unwrap()
}

/// The gradient of every variable of a random LoRA.
fn gradients(base: &Base) -> Vec<(String, Tensor)> {
    let adapter = MethodSpec::from_json(&json!({"type": "lora", "r": 3, "alpha": 5})).unwrap();
    let method = create(&adapter, base, 1);
    let mut random = Random(2);
    for (_, variable) in method.variables() {
        let values: Vec<f32> = (0..variable.elem_count()).map(|_| 0.05 * random.normal()).collect();
        variable.set(&Tensor::from_vec(values, variable.shape(), &Device::Cpu).unwrap()).unwrap();
    }
    let tokens: Vec<u32> = (0..21).map(|_| random.below(VOCAB) as u32).collect();
    let hook = method.hook(None).unwrap();
    let sequences = vec![Sequence { tokens: &tokens, branches: &[], hook: Some(hook.clone()), cache: None }];
    let hidden = base.forward(&mut Batch { sequences, train: None }).unwrap();
    let targets: Vec<Target> = (1..21).map(|i| Target { row: i - 1, token: tokens[i], weight: 0.05 }).collect();
    let loss = base.cross_entropy(&hidden, &targets, Some(hook.as_ref())).unwrap().loss;
    let found = loss.backward().unwrap();
    let gradient = |(name, variable): (String, candle_core::Var)| (name, found.get(&variable).unwrap().clone());
    method.variables().into_iter().map(gradient).collect()
}

#[test]
fn lora_over_every_storage_has_the_gradients_of_the_same_numbers_made_dense() {
    let dir = tempfile::tempdir().unwrap();
    let largest = |x: &Tensor| x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    for base in bases(dir.path()) {
        assert_eq!(base.info.storage, base.info.id);
        let found = gradients(&base);
        let expected = gradients(&dense(&base, dir.path()));
        assert!(found.iter().any(|(name, _)| name.contains("layers.0.self_attn.q_proj.lora_A")));
        for ((name, found), (_, expected)) in found.iter().zip(&expected) {
            let size = largest(expected);
            assert!(size > 1e-6, "{} {name}: {size}", base.info.id);
            let apart = largest(&(found - expected).unwrap()) / size;
            assert!(apart < 1e-4, "{} {name}: {apart}", base.info.id);
        }
    }
}

/// A model whose linears outweigh everything else: 31 million numbers.
fn heavy(dir: &Path) {
    let tiny = Tiny { hidden: 512, intermediate: 2048, layers: 8, head_dim: 128, ..Tiny::default() };
    tiny.write(dir);
    let path = dir.join("model.safetensors");
    let tensors = safetensors::load(&path, &Device::Cpu).unwrap();
    let half = tensors.into_iter().map(|(name, tensor)| (name, tensor.to_dtype(DType::BF16).unwrap()));
    safetensors::save(&half.collect::<HashMap<_, _>>(), &path).unwrap();
}

/// Pages that this process holds in memory, private ones and those of the model's files, in bytes. The pages of its
/// own code come and go with what it runs.
fn resident(dir: &str) -> u64 {
    let (mut kilobytes, mut is_counted) = (0, false);
    for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["Rss:", n, "kB"] if is_counted => kilobytes += n.parse::<u64>().unwrap(),
            [key, ..] if key.ends_with(':') => {}
            [_, _, _, _, inode, path @ ..] => is_counted = *inode == "0" || path.iter().any(|path| path.contains(dir)),
            _ => {}
        }
    }
    1024 * kilobytes
}

/// What a process of its own does for the test below: the tests of one process share their memory.
#[test]
#[ignore = "run by a_base_in_four_bits_takes_no_more_than_its_bytes"]
fn train_in_a_process() {
    let Ok(held) = std::env::var("ATTUNE_TEST_HELD") else { return };
    let dir = std::env::var("ATTUNE_TEST_DIR").unwrap();
    let before = resident(&dir);
    let base = match held.as_str() {
        "Q4_1" => Base::open("heavy", &Path::new(&dir).join("heavy.gguf")).unwrap(),
        "NF4" => Base::open_held("heavy", Path::new(&dir), Held::Nf4).unwrap(),
        _ => Base::open_held("heavy", Path::new(&dir), Held::Nf4Dq).unwrap(),
    };
    assert_eq!(base.info.storage, held);
    assert!(gradients(&base).len() > 2 * 8 * 6);
    println!("\nbytes {} {}", base.bytes(), resident(&dir) - before);
}

/// The process grows by the quantised size, 5 % and a stated 24 MiB: the activations and gradients of one short row,
/// and each thread's tile of dequantised numbers. A dense copy of a single layer in F32 would be 16 MiB more, of all
/// of them 126 MB.
#[test]
fn a_base_in_four_bits_takes_no_more_than_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    heavy(dir.path());
    let tiny = Tiny { hidden: 512, intermediate: 2048, layers: 8, head_dim: 128, ..Tiny::default() };
    quantised::write(&tiny, &dir.path().join("heavy.gguf"), GgmlDType::Q4_1);
    for (held, bits) in [("Q4_1", 5.0), ("NF4", 4.5), ("NF4-DQ", 4.127)] {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "quantised::train_in_a_process", "--ignored", "--nocapture"])
            .env("ATTUNE_TEST_HELD", held)
            .env("ATTUNE_TEST_DIR", dir.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout).into_owned();
        let line = said.lines().find_map(|line| line.strip_prefix("bytes "));
        let numbers: Vec<f64> =
            line.unwrap_or_else(|| panic!("{said}")).split(' ').map(|n| n.parse().unwrap()).collect();
        let (bytes, grown) = (numbers[0], numbers[1]);
        let linears: usize = [Site::Q, Site::K, Site::V, Site::O, Site::Gate, Site::Up, Site::Down]
            .map(|site| match site {
                Site::Q | Site::O => 512 * 512,
                Site::K | Site::V => 256 * 512,
                _ => 2048 * 512,
            })
            .iter()
            .sum();
        let kept = (VOCAB * 512 * 2) as f64;
        let quantised = bits / 8.0 * (8 * linears) as f64;
        assert!(bytes <= 1.01 * quantised + kept, "{held}: {bytes} of {quantised}");
        println!("{held}: {bytes} bytes, the process grew by {grown}");
        assert!(grown <= 1.05 * bytes + f64::from(24 << 20), "{held}: {bytes} bytes, the process grew by {grown}");
    }
}

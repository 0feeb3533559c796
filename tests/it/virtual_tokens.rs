//! Prompts and prefixes: how they begin, what their encoders do, and which files are refused.

use std::sync::Arc;

use attune::{
    domain::{Control, MethodSpec},
    methods::{self, AdapterFiles, MethodError, Trainable},
    model::{Base, Batch, Hook, Sequence},
    trainer::Outcome,
};
use candle_core::{DType, Device, Tensor, quantized::GgmlDType, safetensors};
use serde_json::{Value, json};

use crate::support::{
    quantised,
    tiny::Tiny,
    training::{From, Recorder, create, finish, rows, run, spec},
};

const TEXT: [u32; 8] = [7, 250, 33, 101, 5, 64, 12, 199];

/// Dense, quantised, and of a family with norms on its keys.
fn bases() -> Vec<Arc<Base>> {
    let dir = tempfile::tempdir().unwrap();
    let (dense, qwen, gguf) = (dir.path().join("dense"), dir.path().join("qwen"), dir.path().join("tiny.gguf"));
    Tiny::default().write(&dense);
    Tiny { model_type: "qwen3", head_dim: 32, layers: 3, ..Tiny::default() }.write(&qwen);
    quantised::write(&Tiny::default(), &gguf, GgmlDType::Q4_1);
    [("dense", dense), ("qwen", qwen), ("quantised", gguf)].map(|(id, path)| Base::open(id, &path).unwrap()).into()
}

fn dense() -> Arc<Base> {
    bases().swap_remove(0)
}

fn fresh(base: &Base, adapter: Value, seed: u64) -> Box<dyn Trainable> {
    let spec = MethodSpec::from_json(&adapter).unwrap();
    spec.check(&base.info).unwrap();
    create(&spec, base, seed)
}

fn hidden(base: &Base, tokens: &[u32], hook: Option<Arc<dyn Hook>>) -> Vec<Vec<f32>> {
    let sequences = vec![Sequence { tokens, branches: &[], hook, cache: None }];
    base.forward(&mut Batch { sequences, train: None }).unwrap().to_vec2().unwrap()
}

/// The rows that a prompt puts before the text.
fn prompt(hook: &dyn Hook, base: &Base) -> Tensor {
    let x = hook.embed(&TEXT[..1], true, base.embed(&TEXT[..1]).unwrap()).unwrap();
    x.narrow(0, 0, hook.virtual_tokens()).unwrap()
}

fn values(tensor: &Tensor) -> Vec<Vec<f32>> {
    tensor.to_vec2().unwrap()
}

/// What the base gives for the text behind these tokens.
fn behind(base: &Base, ids: &[u32]) -> Vec<Vec<f32>> {
    hidden(base, &[ids, &TEXT].concat(), None).split_off(ids.len())
}

#[test]
fn a_prompt_of_words_is_the_base_behind_these_words() {
    for base in bases() {
        for (text, ids) in [("abc", b"abcabca".as_slice()), ("abcdefghi", b"abcdefg")] {
            let adapter = json!({"type": "prompt_tuning", "num_virtual_tokens": 7, "prompt_tuning_init": "TEXT",
                                 "prompt_tuning_init_text": text});
            let hook = fresh(&base, adapter, 1).hook(None).unwrap();
            let ids: Vec<u32> = ids.iter().map(|byte| u32::from(*byte)).collect();
            assert_eq!(hidden(&base, &TEXT, Some(hook)), behind(&base, &ids), "{text}");
        }
    }
}

/// Also what shows that a prefix stands where it should: its keys are those that the base keeps for these tokens.
#[test]
fn a_sampled_prefix_is_the_base_behind_these_tokens() {
    for base in bases() {
        let sampled = fresh(&base, json!({"type": "prompt_tuning", "num_virtual_tokens": 6}), 9);
        let all = values(&base.embed(&(0..base.info.vocab as u32).collect::<Vec<_>>()).unwrap());
        let token = |row: &Vec<f32>| all.iter().position(|embedding| embedding == row).unwrap() as u32;
        let ids: Vec<u32> = values(&sampled.variables()[0].1).iter().map(token).collect();
        assert!(ids.iter().any(|id| *id != ids[0]));
        let expected = behind(&base, &ids);
        assert_eq!(hidden(&base, &TEXT, Some(sampled.hook(None).unwrap())), expected);
        let prefix = fresh(&base, json!({"type": "prefix_tuning", "num_virtual_tokens": 6}), 9);
        // A prefix is a block of its own: sums are made in another order.
        let found = hidden(&base, &TEXT, Some(prefix.hook(None).unwrap()));
        assert!(found.concat().iter().zip(expected.concat()).all(|(a, b)| (a - b).abs() < 1e-5));
    }
}

#[test]
fn a_zero_prefix_draws_attention() {
    let base = dense();
    for projection in [false, true] {
        let adapter = json!({"type": "prefix_tuning", "prefix_projection": projection, "init_weights": "zero"});
        let method = fresh(&base, adapter, 1);
        let (key, value) = method.hook(None).unwrap().prefix(1).unwrap().unwrap();
        assert!([key, value].iter().all(|rows| values(rows).iter().flatten().all(|x| *x == 0.0)));
        assert_ne!(hidden(&base, &TEXT, Some(method.hook(None).unwrap())), hidden(&base, &TEXT, None));
    }
}

#[test]
fn dropout_stands_between_the_layers_of_an_lstm_and_comes_from_the_key() {
    let base = dense();
    let lstm = |layers: usize, dropout: f64| {
        let adapter = json!({"type": "p_tuning", "num_virtual_tokens": 5, "encoder_reparameterization_type": "LSTM",
                             "encoder_hidden_size": 8, "encoder_num_layers": layers, "encoder_dropout": dropout});
        fresh(&base, adapter, 3)
    };
    let rows = |method: &dyn Trainable, key| values(&prompt(method.hook(key).unwrap().as_ref(), &base));
    let (dropping, plain) = (lstm(3, 0.5), lstm(3, 0.0));
    assert_eq!(rows(dropping.as_ref(), None), rows(plain.as_ref(), None));
    assert_eq!(rows(plain.as_ref(), Some(1)), rows(plain.as_ref(), None));
    assert_eq!(rows(dropping.as_ref(), Some(1)), rows(dropping.as_ref(), Some(1)));
    assert_ne!(rows(dropping.as_ref(), Some(1)), rows(dropping.as_ref(), Some(2)));
    assert_ne!(rows(dropping.as_ref(), Some(1)), rows(dropping.as_ref(), None));
    // What is stored is made without dropout.
    let stored = methods::load(&dropping.export().unwrap(), &base).unwrap();
    assert_eq!(values(&prompt(stored.as_ref(), &base)), rows(dropping.as_ref(), None));
}

#[test]
fn an_encoder_goes_on_from_a_checkpoint_to_the_bit() {
    let (base, rows) = (dense(), rows(&[9, 6, 12, 7, 10], 6));
    for adapter in [
        json!({"type": "p_tuning", "num_virtual_tokens": 4, "encoder_reparameterization_type": "LSTM",
               "encoder_hidden_size": 8, "encoder_dropout": 0.3}),
        json!({"type": "prefix_tuning", "num_virtual_tokens": 4, "prefix_projection": true}),
    ] {
        let spec = spec(&base, adapter, json!({"n_epochs": 3, "batch_size": 2, "learning_rate": 1e-2}));
        let (whole, all) = finish(&base, &spec, &rows, From::default());
        let mut first = Recorder { control: Some((4, Control::Pause)), ..Recorder::default() };
        assert!(matches!(run(&base, &spec, &rows, From::default(), &mut first).unwrap(), Outcome::Paused));
        let (again, rest) = finish(&base, &spec, &rows, From { resume: first.snapshots.last(), start: None });
        assert_eq!([first.losses(), rest.losses()].concat(), all.losses());
        assert_eq!(again, whole);
    }
}

/// The encoder is not in the files; what it made is, and goes on.
#[test]
fn a_finished_adapter_goes_on_as_the_rows_that_it_is() {
    let (base, rows) = (dense(), rows(&[9, 6, 12], 6));
    let training = json!({"n_epochs": 4, "batch_size": 3, "learning_rate": 1e-2});
    for (adapter, peft_type, goes_on_as) in [
        (json!({"type": "p_tuning", "num_virtual_tokens": 4}), "P_TUNING", "prompt_tuning"),
        (
            json!({"type": "prefix_tuning", "num_virtual_tokens": 4, "prefix_projection": true}),
            "PREFIX_TUNING",
            "prefix_tuning",
        ),
        (json!({"type": "p_tuning_v2", "num_virtual_tokens": 4}), "PREFIX_TUNING", "prefix_tuning"),
    ] {
        let (files, _) = finish(&base, &spec(&base, adapter, training.clone()), &rows, From::default());
        let config: Value = serde_json::from_slice(&files.config).unwrap();
        assert_eq!(config["peft_type"], peft_type);
        let mut continued = serde_json::to_value(methods::continued(&files).unwrap()).unwrap();
        assert_eq!(continued["type"], goes_on_as);
        assert_ne!(continued["prefix_projection"], true);
        let spec = spec(&base, continued.take(), training.clone());
        let (again, recorder) = finish(&base, &spec, &rows, From { start: Some(&files), resume: None });
        // It begins where the other ended: the first loss is the finished adapter's.
        let hook = methods::load(&files, &base).unwrap();
        let sequences =
            rows.iter().map(|row| Sequence { tokens: &row.ids, branches: &[], hook: Some(hook.clone()), cache: None });
        let hidden = base.forward(&mut Batch { sequences: sequences.collect(), train: None }).unwrap();
        let targets = attune::objectives::supervised::targets(rows.iter().map(|row| row.labels.as_slice()));
        let loss = base.cross_entropy(&hidden, &targets, None).unwrap().loss.to_scalar::<f32>().unwrap();
        let apart = recorder.losses()[0] - f64::from(loss) / targets.len() as f64;
        assert!(apart.abs() < 1e-5, "{apart}");
        assert!(recorder.losses()[3] < recorder.losses()[0]);
        assert_ne!(again.weights, files.weights);
        assert_eq!(methods::spec_of(&again).unwrap().type_name(), goes_on_as);
    }
}

/// The longest row that fits beside the virtual tokens is trained on; a longer one is left out and counted.
#[test]
fn rows_that_do_not_fit_beside_virtual_tokens_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    Tiny { context: 64, ..Tiny::default() }.write(dir.path());
    let base = Base::open("short", dir.path()).unwrap();
    let rows = rows(&[9, 44, 45], 6);
    for name in ["prompt_tuning", "prefix_tuning", "p_tuning"] {
        let adapter = json!({"type": name, "num_virtual_tokens": 20});
        let mut spec = spec(&base, adapter, json!({"n_epochs": 1, "batch_size": 3}));
        assert_eq!(spec.training.max_seq_len, 44);
        // Also where an older record asks for more.
        spec.training.max_seq_len = 64;
        let (files, recorder) = finish(&base, &spec, &rows, From::default());
        assert_eq!(recorder.messages, ["1 of 3 training rows are left out: longer than 44 tokens"]);
        let hook = methods::load(&files, &base).unwrap();
        assert_eq!(hook.places(), 20);
        let sequences = vec![Sequence { tokens: &rows[2].ids, branches: &[], hook: Some(hook), cache: None }];
        let error = base.forward(&mut Batch { sequences, train: None }).unwrap_err().to_string();
        assert!(error.contains("beyond the context: 65 of 64"), "{error}");
    }
}

#[test]
fn files_that_do_not_fit_are_refused_by_name() {
    let base = dense();
    let refusal = |files: &AdapterFiles| match methods::load(files, &base) {
        Err(error @ (MethodError::Mismatch(_) | MethodError::Unsupported(_))) => error.to_string(),
        Err(error) => panic!("{error:?}"),
        Ok(_) => panic!("the files were taken"),
    };
    for adapter in [
        json!({"type": "prompt_tuning", "num_virtual_tokens": 5}),
        json!({"type": "p_tuning", "num_virtual_tokens": 5}),
        json!({"type": "prefix_tuning", "num_virtual_tokens": 5}),
    ] {
        let is_prefix = adapter["type"] == "prefix_tuning";
        let files = fresh(&base, adapter, 2).export().unwrap();
        let config = |key: &str, value: Value| {
            let mut config: Value = serde_json::from_slice(&files.config).unwrap();
            config[key] = value;
            AdapterFiles { config: config.to_string().into_bytes(), ..files.clone() }
        };
        for (key, value) in [
            ("num_transformer_submodules", json!(2)),
            ("num_layers", json!(3)),
            ("num_virtual_tokens", Value::Null),
            ("num_virtual_tokens", json!("5")),
            ("token_dim", json!(48)),
            ("modules_to_save", json!(["lm_head"])),
            ("task_type", json!("SEQ_2_SEQ_LM")),
        ] {
            let text = refusal(&config(key, value));
            assert!(text.contains(&format!("adapter_config.json: {key}")), "{key}: {text}");
        }
        // Before PEFT knew of grouped keys it wrote the model's width and heads for prefixes.
        if is_prefix {
            let text = refusal(&config("token_dim", json!(64)));
            assert!(text.contains("token_dim is 64, not 32 (of the base's keys"), "{text}");
            assert!(refusal(&config("num_attention_heads", json!(4))).contains("num_attention_heads is 4, not 2"));
        } else {
            methods::load(&config("num_attention_heads", json!(12)), &base).unwrap();
        }
        for (key, value) in [("peft_version", json!("9")), ("num_layers", Value::Null), ("new_key", json!(1))] {
            methods::load(&config(key, value), &base).unwrap();
        }
        let text = refusal(&config("num_virtual_tokens", json!(6)));
        assert!(text.contains("tensor prompt_embeddings has shape [5, "), "{text}");

        let rows = safetensors::load_buffer(&files.weights, &Device::Cpu).unwrap()["prompt_embeddings"].clone();
        let weights = |name: &str, tensor: &Tensor| {
            let dir = tempfile::tempdir().unwrap();
            safetensors::save(&[(name.to_owned(), tensor.clone())].into(), dir.path().join("a")).unwrap();
            AdapterFiles { weights: std::fs::read(dir.path().join("a")).unwrap(), ..files.clone() }
        };
        let text = refusal(&weights("base_model.model.prompt_embeddings", &rows));
        assert!(text.contains("base_model.model.prompt_embeddings"), "{text}");
        assert!(refusal(&weights("prompt_embeddings", &rows.narrow(1, 0, 16).unwrap())).contains("has shape [5, 16]"));
        assert!(refusal(&weights("prompt_embeddings", &(&rows * f64::NAN).unwrap())).contains("NaN"));
        methods::load(&weights("prompt_embeddings", &rows.to_dtype(DType::F16).unwrap()), &base).unwrap();
    }
}

/// What PEFT writes and does not read back: knobs of another encoder, a text beside another init.
#[test]
fn idle_keys_of_pefts_configs_are_left_out() {
    let spec = |config: Value| {
        let files = AdapterFiles { config: config.to_string().into_bytes(), weights: Vec::new() };
        let spec = methods::spec_of(&files).unwrap();
        spec.check(&dense().info).unwrap();
        serde_json::to_value(spec).unwrap()
    };
    let idle = json!({"peft_type": "P_TUNING", "num_virtual_tokens": 5, "encoder_reparameterization_type": "MLP",
                      "encoder_num_layers": 5, "encoder_dropout": 0.4, "encoder_hidden_size": 7});
    let found = spec(idle);
    assert_eq!((&found["encoder_num_layers"], &found["encoder_dropout"]), (&json!(2), &json!(0.0)));
    let text = json!({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "prompt_tuning_init": "RANDOM",
                      "prompt_tuning_init_text": "hello"});
    assert_eq!(spec(text)["prompt_tuning_init_text"], Value::Null);
    let width = json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "encoder_hidden_size": 16,
                       "prefix_projection": false, "init_weights": null});
    let found = spec(width);
    assert_eq!((&found["encoder_hidden_size"], &found["init_weights"]), (&Value::Null, &json!("random")));
}

use serde_json::json;

use super::*;
use crate::domain::Site;

/// SmolLM2-135M's shapes, with fewer layers.
fn base() -> BaseInfo {
    BaseInfo {
        id: "small".into(),
        hash: "00".into(),
        architecture: "llama".into(),
        storage: "Q4_1".into(),
        hidden: 576,
        intermediate: 1536,
        layers: 12,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocab: 49152,
        context: 2048,
        short_context: None,
        tied: true,
        parameters: 1,
        has_chat_template: true,
    }
}

fn lora(value: Value) -> LoraSpec {
    match MethodSpec::from_json(&value).unwrap() {
        MethodSpec::Lora(spec) => spec,
        other => panic!("{other:?}"),
    }
}

/// `(param, message)` of what reading or checking `adapter` says.
fn refusal(adapter: Value) -> (String, String) {
    let error = match MethodSpec::from_json(&adapter) {
        Err(error) => error,
        Ok(spec) => spec.check(&base()).unwrap_err(),
    };
    (error.param, error.message)
}

#[test]
fn defaults_aliases_and_round_trip() {
    assert_eq!(MethodSpec::from_json(&json!({"type": "lora"})).unwrap(), MethodSpec::default());
    let spec =
        lora(json!({"type": "lora", "alpha": 32, "dropout": 0.1, "layers_to_transform": 3, "exclude_modules": null}));
    assert_eq!((spec.lora_alpha, spec.lora_dropout), (32.0, 0.1));
    assert_eq!(spec.layers_to_transform, Some(vec![3]));
    let echoed = serde_json::to_value(MethodSpec::Lora(spec.clone())).unwrap();
    assert_eq!(lora(echoed), spec);
}

#[test]
fn refusals_name_the_field() {
    let typed = |name: &str, mut adapter: Value| {
        adapter["type"] = json!(name);
        adapter
    };
    let prompt = |adapter| typed("prompt_tuning", adapter);
    let p_tuning = |adapter| typed("p_tuning", adapter);
    let prefix = |adapter| typed("prefix_tuning", adapter);
    let gate = |mut adapter: Value| {
        if adapter.get("adapters").is_none() {
            adapter["adapters"] = json!(["a", "b"]);
        }
        typed("xlora", adapter)
    };
    let lstm = |mut adapter: Value| {
        adapter["encoder_reparameterization_type"] = json!("LSTM");
        p_tuning(adapter)
    };
    let cases = [
        (json!({"type": "lorra"}), "adapter.type", "unknown method lorra; known are lora"),
        (json!({"type": "xlora"}), "adapter.adapters", "names 0 models; it must be 2 to 64"),
        (gate(json!({"adapters": "a"})), "adapter.adapters", "invalid type: string"),
        (gate(json!({"adapters": ["a", "b", "a"]})), "adapter.adapters", "names a twice"),
        (gate(json!({"experts": []})), "adapter.experts", "unknown field"),
        (gate(json!({"softmax_temperature": 0})), "adapter.softmax_temperature", "above 0"),
        (gate(json!({"top_k_lora": 3})), "adapter.top_k_lora", "1 to 2, the number of adapters"),
        (gate(json!({"top_k_lora": 0})), "adapter.top_k_lora", "1 to 2"),
        (gate(json!({"enable_softmax_topk": true})), "adapter.top_k_lora", "say how many"),
        (gate(json!({"top_k_lora": 1, "scaling_pass_value": 0.5})), "adapter.scaling_pass_value", "must be 0"),
        (gate(json!({"scaling_pass_value": 101})), "adapter.scaling_pass_value", "at most 100"),
        (gate(json!({"global_scaling_weight": -101})), "adapter.global_scaling_weight", "at most 100"),
        (gate(json!({"xlora_depth": 0})), "adapter.xlora_depth", "1 to 8"),
        (gate(json!({"xlora_size": 0})), "adapter.xlora_size", "1 to 8192"),
        (gate(json!({"xlora_dropout_p": 1})), "adapter.xlora_dropout_p", "below 1"),
        (json!({"type": 3}), "adapter.type", "not a string"),
        (json!([]), "adapter", "not a JSON object"),
        (json!({"rank": 8}), "adapter.rank", "unknown field adapter.rank"),
        (json!({"alpha": 1, "lora_alpha": 1}), "adapter.lora_alpha", "given twice"),
        (json!({"r": "8"}), "adapter.r", "invalid type: string"),
        (json!({"r": -8}), "adapter.r", "invalid value"),
        (json!({"rank_pattern": {"q_proj": "x"}}), "adapter.rank_pattern.q_proj", "invalid type"),
        (json!({"target_modules": 7}), "adapter.target_modules", "a string or a list of strings"),
        (json!({"init_lora_weights": "pisa"}), "adapter.init_lora_weights", "gaussian"),
        (json!({"r": 0}), "adapter.r", "at least 1"),
        (json!({"r": 512}), "adapter.r", "rank 512 is above the limit of 192 of model.layers.0.self_attn.k_proj"),
        (json!({"rank_pattern": {"k_proj": 193}}), "adapter.rank_pattern", "rank 193 is above the limit of 192"),
        (json!({"rank_pattern": {"layers.99.k_proj": 3}}), "adapter.rank_pattern", "matches no module"),
        (json!({"alpha_pattern": {"(": 3}}), "adapter.alpha_pattern", "not a regular expression"),
        (json!({"alpha_pattern": {"q_proj": -3}}), "adapter.alpha_pattern", "above 0"),
        (json!({"alpha": 0}), "adapter.lora_alpha", "above 0"),
        (json!({"dropout": 1.0}), "adapter.lora_dropout", "below 1"),
        (json!({"target_modules": ["q_proj", "query"]}), "adapter.target_modules", "query matches no module"),
        (json!({"target_modules": []}), "adapter.target_modules", "the empty list"),
        (json!({"target_modules": "proj"}), "adapter.target_modules", "proj matches no module"),
        (json!({"target_modules": ["lm_head"], "layers_to_transform": 1}), "adapter.target_modules", "leave"),
        (json!({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}), "adapter.target_modules", "leave"),
        (json!({"layers_to_transform": [12]}), "adapter.layers_to_transform", "below the 12 layers"),
        (json!({"layers_to_transform": 1, "target_modules": ".*q_proj"}), "adapter.layers_to_transform", "beside"),
        (prompt(json!({"num_virtual_tokens": 0})), "adapter.num_virtual_tokens", "is 0; it must be 1 to 1024"),
        (prompt(json!({"num_virtual_tokens": 1025})), "adapter.num_virtual_tokens", "half of the context of small"),
        (prompt(json!({"num_virtual_tokens": 2.5})), "adapter.num_virtual_tokens", "invalid type"),
        (prompt(json!({"prompt_tuning_init": "text"})), "adapter.prompt_tuning_init", "`SAMPLE_VOCAB`, `TEXT`"),
        (prompt(json!({"prompt_tuning_init": "TEXT"})), "adapter.prompt_tuning_init_text", "which has none"),
        (prompt(json!({"prompt_tuning_init_text": "x"})), "adapter.prompt_tuning_init_text", "only read when"),
        (p_tuning(json!({"num_virtual_tokens": 0})), "adapter.num_virtual_tokens", "1 to 1024"),
        (p_tuning(json!({"encoder_hidden_size": 0})), "adapter.encoder_hidden_size", "is 0; it must be 1 to 2304"),
        (p_tuning(json!({"encoder_hidden_size": 2305})), "adapter.encoder_hidden_size", "four times the width"),
        (p_tuning(json!({"encoder_num_layers": 0})), "adapter.encoder_num_layers", "1 to 8"),
        (p_tuning(json!({"encoder_num_layers": 3})), "adapter.encoder_num_layers", "the MLP always has"),
        (p_tuning(json!({"encoder_dropout": 1.0})), "adapter.encoder_dropout", "below 1"),
        (p_tuning(json!({"encoder_dropout": 0.1})), "adapter.encoder_dropout", "the MLP has no dropout"),
        (lstm(json!({"encoder_num_layers": 9})), "adapter.encoder_num_layers", "is 9; it must be 1 to 8"),
        (lstm(json!({"encoder_num_layers": 1, "encoder_dropout": 0.1})), "adapter.encoder_dropout", "one only"),
        (
            p_tuning(json!({"encoder_reparameterization_type": "GRU"})),
            "adapter.encoder_reparameterization_type",
            "expected `MLP` or `LSTM`",
        ),
        (prefix(json!({"num_virtual_tokens": 1025})), "adapter.num_virtual_tokens", "1 to 1024"),
        (prefix(json!({"encoder_hidden_size": 9})), "adapter.encoder_hidden_size", "prefix_projection's network"),
        (
            prefix(json!({"encoder_hidden_size": 2305, "prefix_projection": true})),
            "adapter.encoder_hidden_size",
            "is 2305; it must be 1 to 2304",
        ),
        (prefix(json!({"init_weights": "zeros"})), "adapter.init_weights", "expected one of `sample_vocab`"),
        (
            prefix(json!({"init_weights": "sample_vocab", "prefix_projection": true})),
            "adapter.init_weights",
            "random or zero",
        ),
        (typed("p_tuning_v2", json!({"num_virtual_tokens": 0})), "adapter.num_virtual_tokens", "1 to 1024"),
        (prompt(json!({"r": 8})), "adapter.r", "unknown field adapter.r; known are num_virtual_tokens, prompt"),
    ];
    for (adapter, param, text) in cases {
        let (named, message) = refusal(adapter.clone());
        assert_eq!(named, param, "{adapter}: {message}");
        assert!(message.contains(text), "{adapter}: {message}");
    }
}

#[test]
fn a_mixtures_knobs_belong_to_its_variant() {
    let moe = |mut value: Value| {
        value["type"] = json!("moe_lora");
        value
    };
    let cases = [
        (json!({"variant": "mixlore"}), "adapter.variant", "unknown variant"),
        (json!({"variant": "loramoe", "top_k": 2}), "adapter.top_k", "a knob of mixlora, mola, not of"),
        (json!({"experts_per_layer": [2, 4]}), "adapter.experts_per_layer", "a knob of mola"),
        (json!({"variant": "loramoe", "router_aux_loss_coef": 0.1}), "adapter.router_aux_loss_coef", "adamole, not of"),
        (json!({"max_threshold": 0.1}), "adapter.max_threshold", "a knob of adamole"),
        (json!({"variant": "mola", "blc_weight": 0.1}), "adapter.blc_weight", "a knob of loramoe"),
        (json!({"variant": "loramoe", "blc_alpha": 0.1}), "adapter.blc_alpha", "task type"),
        (json!({"num_experts": 1}), "adapter.num_experts", "2 to 64"),
        (json!({"num_experts": 65}), "adapter.num_experts", "2 to 64"),
        (json!({"num_experts": 4, "top_k": 5}), "adapter.top_k", "2 to 4"),
        (json!({"top_k": 1}), "adapter.top_k", "2 to 8"),
        (json!({"variant": "mola", "num_experts": 4, "experts_per_layer": [2]}), "adapter.num_experts", "both given"),
        (json!({"variant": "mola", "experts_per_layer": []}), "adapter.experts_per_layer", "divides the 12 layers"),
        (json!({"variant": "mola", "experts_per_layer": [2, 2, 2, 2, 2]}), "adapter.experts_per_layer", "a list of 5"),
        (json!({"variant": "mola", "experts_per_layer": [2, 1]}), "adapter.experts_per_layer", "2 to 64"),
        (json!({"variant": "mola", "experts_per_layer": [3, 4], "top_k": 4}), "adapter.top_k", "2 to 3"),
        (json!({"variant": "adamole", "max_threshold": 0.3}), "adapter.max_threshold", "at most 0.25"),
        (json!({"router_aux_loss_coef": 2}), "adapter.router_aux_loss_coef", "0 to 1"),
        (json!({"router_init_range": 0}), "adapter.router_init_range", "above 0"),
        (json!({"jitter_noise": 1}), "adapter.jitter_noise", "below 1"),
        (json!({"r": 193}), "adapter.r", "1 to 192"),
        (json!({"target_modules": ["q_proj"]}), "adapter.target_modules", "gate_proj, up_proj or down_proj"),
        (json!({"target_modules": ["query"]}), "adapter.target_modules", "query matches no module"),
        (json!({"alpha": -1}), "adapter.lora_alpha", "above 0"),
        (json!({"dropout": 1}), "adapter.lora_dropout", "below 1"),
    ];
    for (adapter, param, text) in cases {
        let (named, message) = refusal(moe(adapter.clone()));
        assert_eq!(named, param, "{adapter}: {message}");
        assert!(message.contains(text), "{adapter}: {message}");
    }
    let deep = BaseInfo { layers: 40, ..base() };
    let wide = MethodSpec::from_json(&moe(json!({"variant": "mola", "num_experts": 64}))).unwrap();
    assert_eq!(wide.check(&base()), Ok(()));
    assert!(wide.check(&deep).unwrap_err().message.contains("36680 tensors, above the limit of 20000"));
    // What a variant leaves open is filled in, and stays when it is read again.
    let resolved = |value: Value| serde_json::to_value(MethodSpec::from_json(&moe(value)).unwrap()).unwrap();
    let adamole = resolved(json!({"variant": "adamole"}));
    assert_eq!((&adamole["num_experts"], &adamole["max_threshold"]), (&json!(4), &json!(0.25)));
    assert_eq!((&adamole["top_k"], &adamole["blc_weight"]), (&Value::Null, &Value::Null));
    assert_eq!(resolved(adamole.clone()), adamole);
    let spec = MethodSpec::from_json(&moe(json!({"variant": "mola", "experts_per_layer": [2, 4, 6, 8]}))).unwrap();
    spec.check(&base()).unwrap();
    let MethodSpec::MoeLora(mola) = spec else { panic!() };
    let experts: Vec<usize> = (0..12).map(|layer| mola.experts(layer, &base())).collect();
    assert_eq!(experts, [2, 2, 2, 4, 4, 4, 6, 6, 6, 8, 8, 8]);
}

#[test]
fn unipelts_knobs_have_limits() {
    for (key, value, text) in [
        ("lora_r", json!(0), "1 to 192"),
        ("lora_r", json!(193), "1 to 192"),
        ("prefix_length", json!(0), "1 to 1024"),
        ("bottleneck_size", json!(0), "1 to 8192"),
        ("reduction_factor", json!(577), "1 to 576"),
        ("gate_mode", json!("prompt_mean"), "read in pieces"),
        ("gate_mode", json!("none"), "unknown variant"),
        ("lora_alpha", json!(1), "unknown field"),
    ] {
        let mut adapter = json!({"type": "unipelt"});
        adapter[key] = value;
        let (param, message) = refusal(adapter);
        assert_eq!(param, format!("adapter.{key}"), "{message}");
        assert!(message.contains(text), "{message}");
    }
}

#[test]
fn targets_follow_peft() {
    let paths = |value: Value| -> Vec<String> {
        let targets = lora(value).targets(&base()).unwrap();
        targets.iter().map(|target| target.site.path(target.layer)).collect()
    };
    assert_eq!(paths(json!({})).len(), 12 * 7);
    assert_eq!(paths(json!({"target_modules": ["q_proj", "v_proj"]})).len(), 24);
    // A dot boundary: `proj` ends no module's last name, `1.mlp.up_proj` ends those of layers 1 and not 11.
    assert!(paths(json!({"target_modules": ["proj"]})).is_empty());
    assert_eq!(paths(json!({"target_modules": ["1.mlp.up_proj"]})), ["model.layers.1.mlp.up_proj"]);
    // A string must match the whole path.
    assert!(paths(json!({"target_modules": "self_attn.q_proj"})).is_empty());
    assert_eq!(paths(json!({"target_modules": r".*\.(3|4)\.self_attn\.q_proj"})).len(), 2);
    assert_eq!(paths(json!({"target_modules": "q_proj|.*k_proj"})).len(), 12);
    assert_eq!(paths(json!({"exclude_modules": ["down_proj"]})).len(), 12 * 6);
    assert_eq!(paths(json!({"exclude_modules": ".*mlp.*", "layers_to_transform": [0, 11]})).len(), 2 * 4);
}

#[test]
fn ranks_and_scales_are_resolved_by_pattern() {
    let spec = lora(json!({
        "r": 4, "alpha": 6, "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 5},
        "alpha_pattern": {"1.self_attn.(q|k)_proj": 10},
    }));
    spec.check(&base()).unwrap();
    let targets = spec.targets(&base()).unwrap();
    let find = |layer, site| *targets.iter().find(|t| (t.layer, t.site) == (layer, site)).unwrap();
    assert_eq!((find(0, Site::Q).r, find(0, Site::Q).scale), (3, 6.0 / 3.0));
    assert_eq!((find(2, Site::Q).r, find(2, Site::Q).scale), (5, 6.0 / 5.0));
    assert_eq!((find(1, Site::Q).r, find(1, Site::Q).scale), (5, 10.0 / 5.0));
    assert_eq!((find(1, Site::K).r, find(1, Site::K).scale), (4, 10.0 / 4.0));
    // `1.self…` needs a dot or the start before it.
    assert_eq!(find(11, Site::K).alpha, 6.0);
    let rs = LoraSpec { use_rslora: true, ..spec.clone() };
    assert_eq!(rs.targets(&base()).unwrap()[0].scale, 6.0 / 3f64.sqrt());

    let qv = lora(json!({"target_modules": ["q_proj", "v_proj"]}));
    assert_eq!(qv.trainable(&base()), 12 * 8 * (576 + 576 + 576 + 192));
}

/// A preset has defaults of its own, also where a request names other fields.
#[test]
fn presets_fill_in_their_own_defaults() {
    let tokens = |value: Value| MethodSpec::from_json(&value).unwrap().virtual_tokens();
    assert_eq!(tokens(json!({"type": "prefix_tuning"})), 20);
    assert_eq!(tokens(json!({"type": "p_tuning_v2", "init_weights": "zero"})), 64);
    assert_eq!(tokens(json!({"type": "p_tuning_v2", "num_virtual_tokens": 3})), 3);
    let spec = MethodSpec::from_json(&json!({"type": "p_tuning_v2", "prefix_projection": null})).unwrap();
    let stored = serde_json::to_value(&spec).unwrap();
    assert_eq!((&stored["type"], &stored["prefix_projection"]), (&json!("p_tuning_v2"), &json!(false)));
    assert_eq!(serde_json::from_value::<MethodSpec>(stored.clone()).unwrap(), spec);
    assert_eq!(MethodSpec::from_json(&stored).unwrap(), spec);
}

#[test]
fn objectives_by_name() {
    assert_eq!(ObjectiveSpec::from_json(&json!({"type": "supervised"})), Ok(ObjectiveSpec::default()));
    let refusal = |value: Value| ObjectiveSpec::from_json(&value).unwrap_err();
    assert!(refusal(json!({"type": "sft"})).message.contains("unknown objective sft"));
    assert_eq!(refusal(json!({"type": "supervised", "dpo": {}})).param, "method.dpo");
    let hyper = |value: Value| Hyperparameters::from_method(&value);
    let method =
        json!({"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto", "batch_size": 4}}});
    assert_eq!(hyper(method).unwrap(), Hyperparameters { batch_size: Some(4), ..Default::default() });
    let wrong = json!({"type": "supervised", "supervised": {"hyperparameters": {"epochs": 1}}});
    assert_eq!(hyper(wrong).unwrap_err().param, "method.supervised.hyperparameters.epochs");
    let wrong = json!({"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "many"}}});
    assert_eq!(hyper(wrong).unwrap_err().param, "method.supervised.hyperparameters.n_epochs");
    assert_eq!(hyper(json!({"supervised": {"beta": 1}})).unwrap_err().param, "method.supervised.beta");
}

#[test]
fn training_is_resolved() {
    let hyper = Hyperparameters { learning_rate_multiplier: Some(0.5), ..Default::default() };
    let resolve = |value: Value, hyper: &Hyperparameters, rows: u64| {
        let request = TrainingRequest::from_json(&value, hyper)?;
        Training::resolve(&request, &MethodSpec::default(), &base(), rows)
    };
    let training = resolve(Value::Null, &hyper, 100).unwrap();
    assert_eq!((training.n_epochs, training.batch_size, training.max_seq_len), (3, 6, 1024));
    assert_eq!((training.learning_rate, training.lr_scheduler), (1e-4, Schedule::Linear));
    assert_eq!(resolve(json!({"learning_rate": 3e-3}), &hyper, 0).unwrap().learning_rate, 3e-3);
    assert_eq!(resolve(Value::Null, &hyper, 3).unwrap().batch_size, 1);
    assert_eq!(resolve(Value::Null, &hyper, 5000).unwrap().batch_size, 8);
    // What a job echoes can be asked for again.
    let echoed = serde_json::to_value(&training).unwrap();
    assert_eq!(resolve(echoed, &Hyperparameters::default(), 100).unwrap(), training);

    // Virtual tokens leave the text a smaller share of the context.
    let prompt = MethodSpec::from_json(&json!({"type": "prompt_tuning", "num_virtual_tokens": 1024})).unwrap();
    let beside = |value: Value| {
        let request = TrainingRequest::from_json(&value, &Hyperparameters::default())?;
        Training::resolve(&request, &prompt, &BaseInfo { context: 2047, ..base() }, 9)
    };
    assert_eq!(beside(Value::Null).unwrap().max_seq_len, 1023);
    assert_eq!(beside(json!({"max_seq_len": 1023})).unwrap().max_seq_len, 1023);
    let refused = beside(json!({"max_seq_len": 1024})).unwrap_err();
    assert_eq!(refused.param, "training.max_seq_len");
    assert!(refused.message.ends_with("2 to 1023: the context of 2047 without 1024 virtual tokens"), "{refused}");

    let cases = [
        (json!({"max_seq_len": 4096}), "training.max_seq_len"),
        (json!({"max_seq_length": 40}), "training.max_seq_length"),
        (json!({"warmup_ratio": 1.5}), "training.warmup_ratio"),
        (json!({"learning_rate": 0}), "training.learning_rate"),
        (json!({"learning_rate": -1}), "training.learning_rate"),
        (json!({"lr_scheduler": "cosin"}), "training.lr_scheduler"),
        (json!({"early_stopping": {"patience": 0}}), "training.early_stopping.patience"),
        (json!({"early_stopping": {"patience": 1, "delta": 2}}), "training.early_stopping.delta"),
        (json!({"grad_accumulation": 0}), "training.grad_accumulation"),
        (json!({"max_steps": 1.5}), "training.max_steps"),
        (json!({"n_epochs": 1001}), "method.supervised.hyperparameters.n_epochs"),
    ];
    for (value, param) in cases {
        assert_eq!(resolve(value.clone(), &hyper, 9).unwrap_err().param, param, "{value}");
    }
    let twice = Hyperparameters { n_epochs: Some(2), ..Default::default() };
    assert_eq!(resolve(json!({"n_epochs": 3}), &twice, 9).unwrap_err().param, "training.n_epochs");
}

#[test]
fn adalora_is_refused_by_field() {
    let cases = [
        (json!({"target_r": 0}), "adapter.target_r", "at least 1"),
        (json!({"init_r": 8}), "adapter.init_r", "above target_r, which is 8"),
        (json!({"init_r": 193}), "adapter.init_r", "above the limit of 192 of model.layers.0.self_attn.k_proj"),
        (json!({"tinit": -1}), "adapter.tinit", "invalid value"),
        (json!({"deltaT": 0}), "adapter.deltaT", "at least 1"),
        (json!({"delta_t": 2}), "adapter.delta_t", "unknown field"),
        (json!({"beta1": 1.0}), "adapter.beta1", "below 1"),
        (json!({"beta2": 0.0}), "adapter.beta2", "above 0"),
        (json!({"orth_reg_weight": -0.1}), "adapter.orth_reg_weight", "at least 0"),
        (json!({"alpha": 0}), "adapter.lora_alpha", "above 0"),
        (json!({"dropout": 1}), "adapter.lora_dropout", "below 1"),
        (json!({"r": 8}), "adapter.r", "unknown field"),
        (json!({"target_modules": ["query"]}), "adapter.target_modules", "query matches no module"),
        (json!({"layers_to_transform": 12}), "adapter.layers_to_transform", "below the 12 layers"),
    ];
    for (mut adapter, param, text) in cases {
        adapter["type"] = json!("adalora");
        let (named, message) = refusal(adapter.clone());
        assert!(named == param && message.contains(text), "{adapter}: {named}: {message}");
    }
}

#[test]
fn adaloras_schedule_fits_the_run() {
    let spec = |value: Value| match MethodSpec::from_json(&value).unwrap() {
        MethodSpec::AdaLora(spec) => spec,
        other => panic!("{other:?}"),
    };
    let mut auto = MethodSpec::from_json(&json!({"type": "adalora", "deltaT": 4})).unwrap();
    auto.fit(&base(), 40).unwrap();
    let filled = serde_json::to_value(&auto).unwrap();
    assert_eq!((&filled["tinit"], &filled["tfinal"]), (&json!(4), &json!(12)));
    let budget = spec(filled).budget(40).unwrap();
    // Steps count from 0; the last one settles the ranks whatever deltaT says.
    let prunes: Vec<u64> = (0..40).filter(|step| budget.prunes_after(*step)).collect();
    assert_eq!(prunes, [8, 12, 16, 20, 24, 28]);
    // ⌊(84 − 56) · (1 − 4/24)³ + 56⌋ and so on.
    let left: Vec<usize> = prunes.iter().map(|step| budget.left(*step, 84, 56)).collect();
    assert_eq!(left, [72, 64, 59, 57, 56, 56]);

    let refusal = |value: Value, steps| spec(value).budget(steps).unwrap_err();
    let cases = [
        (json!({"type": "adalora"}), 1, "adapter.type"),
        (json!({"type": "adalora", "tinit": 7}), 10, "adapter.tinit"),
        (json!({"type": "adalora", "tinit": 6, "tfinal": 4}), 10, "adapter.tfinal"),
        (json!({"type": "adalora", "tfinal": u64::MAX}), 1000, "adapter.tfinal"),
    ];
    for (value, steps, param) in cases {
        let error = refusal(value.clone(), steps);
        assert_eq!(error.param, param, "{value}");
        assert!(error.message.contains(&format!("of the run's {steps}")), "{}", error.message);
    }
    assert!(spec(json!({"type": "adalora"})).budget(2).is_ok());
    let never = refusal(json!({"type": "adalora", "tfinal": 0}), 10);
    assert!(never.param == "adapter.tfinal" && never.message.contains("at least 1"), "{never:?}");
}

#[test]
fn ia3_takes_its_familys_modules() {
    let paths = |value: Value, family: &str| -> Vec<(String, bool)> {
        let base = BaseInfo { architecture: family.into(), layers: 1, ..base() };
        let MethodSpec::Ia3(spec) = MethodSpec::from_json(&value).unwrap() else { panic!() };
        spec.check(&base).unwrap();
        let short = |path: String| path.rsplit('.').next().unwrap().to_owned();
        let targets = spec.targets(&base).unwrap();
        targets.iter().map(|t| (short(t.site.path(t.layer)), t.is_feedforward)).collect()
    };
    let named = |names: [&str; 3]| names.map(|name| (name.to_owned(), name == "down_proj")).to_vec();
    for (family, first) in [("llama", "k_proj"), ("mistral", "k_proj"), ("qwen2", "q_proj"), ("gemma3_text", "q_proj")]
    {
        let mut expected = named([first, "v_proj", "down_proj"]);
        expected.sort_by_key(|(name, _)| Site::LAYER.iter().position(|site| site.module().ends_with(name)));
        assert_eq!(paths(json!({"type": "ia3"}), family), expected);
    }
    // Ends of names, without a dot; a regular expression matches whole paths.
    let adapter = json!({"type": "ia3", "target_modules": ["o_proj", "up_proj"], "feedforward_modules": ["o_proj"]});
    assert_eq!(paths(adapter, "llama"), [("o_proj".into(), true), ("up_proj".into(), false)]);
    let adapter = json!({"type": "ia3", "target_modules": "all-linear", "feedforward_modules": r".*mlp\.(up|gate)_proj",
                         "exclude_modules": r".*self_attn.*"});
    assert_eq!(
        paths(adapter, "llama"),
        [("gate_proj".into(), true), ("up_proj".into(), true), ("down_proj".into(), false)]
    );

    let cases = [
        (json!({"feedforward_modules": ["up_proj"]}), "adapter.feedforward_modules", "not in target_modules"),
        (json!({"target_modules": ["lm_head"]}), "adapter.target_modules", "lm_head cannot"),
        (json!({"target_modules": []}), "adapter.target_modules", "empty list"),
        (
            json!({"target_modules": ".*q_proj", "feedforward_modules": ["x"]}),
            "adapter.feedforward_modules",
            "x matches",
        ),
        (json!({"feedforward_modules": "("}), "adapter.feedforward_modules", "not a regular expression"),
        (json!({"feedforward_modules": "mlp"}), "adapter.feedforward_modules", "mlp matches no module"),
        (json!({"r": 8}), "adapter.r", "unknown field adapter.r; known are exclude_modules"),
    ];
    for (mut adapter, param, text) in cases {
        adapter["type"] = json!("ia3");
        let (named, message) = refusal(adapter.clone());
        assert!(named == param && message.contains(text), "{adapter}: {named}: {message}");
    }
}

#[test]
fn qlora_is_lora_on_a_base_in_four_bits() {
    let given = json!({"type": "qlora", "r": 3, "alpha": 7, "double_quant": true, "quant_type": "nf4"});
    let spec = MethodSpec::from_json(&given).unwrap();
    let MethodSpec::Qlora(qlora) = &spec else { panic!("{spec:?}") };
    assert_eq!(qlora.lora, lora(json!({"r": 3, "alpha": 7})));
    assert_eq!(MethodSpec::from_json(&serde_json::to_value(&spec).unwrap()).unwrap(), spec);
    assert_eq!(serde_json::from_value::<MethodSpec>(serde_json::to_value(&spec).unwrap()).unwrap(), spec);

    let held = |storage: &str| BaseInfo { storage: storage.into(), ..base() };
    assert_eq!(spec.check(&held("NF4-DQ")), Ok(()));
    for (storage, param) in [
        ("NF4", "adapter.double_quant"),
        ("Q4_1", "adapter.quant_type"),
        ("Q5_1", "adapter.type"),
        ("F16", "adapter.type"),
    ] {
        let error = spec.check(&held(storage)).unwrap_err();
        assert_eq!(error.param, param, "{storage}");
        assert!(error.message.contains("--model small-nf4=nf4:SOURCE") && error.message.contains(storage), "{error}");
    }
    let any = MethodSpec::from_json(&json!({"type": "qlora"})).unwrap();
    for storage in ["NF4", "NF4-DQ", "Q4_0", "Q4_1", "Q4_K"] {
        assert_eq!(any.check(&held(storage)), Ok(()), "{storage}");
    }
    for (given, param) in [
        (json!({"type": "qlora", "quant_type": "fp4"}), "adapter.quant_type"),
        (json!({"type": "qlora", "double_quant": 1}), "adapter.double_quant"),
        (json!({"type": "qlora", "r": "8"}), "adapter.r"),
        (json!({"type": "qlora", "bits": 4}), "adapter.bits"),
        (json!({"type": "qlora", "r": 0}), "adapter.r"),
    ] {
        assert_eq!(refusal(given).0, param);
    }
}

mod full;
mod knobs;
mod lora;

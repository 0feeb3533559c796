//! UniPELT as AdapterHub's directory (`adapters` 1.3): `load_adapter(FOLDER, use_safetensors=True)` of an `…AdapterModel`.
//!
//! There a gate is the mean of `σ(w·x_t + b)` over all positions of a text, so that only adapters of `sequence_mean` have
//! a file of that kind, and those have a head of their own. The network that makes the prefix is one for all layers;
//! AdapterHub names it again under each of them, which would be a copy a layer here and is left out.

use serde_json::{Value, json};

use crate::{
    domain::{BaseInfo, TaskHead, UnipeltSpec, spec::GateMode},
    methods::{MethodError, Named, file, part::Part, score},
};

/// The adapter's name in the files. Whoever loads it may give it another.
const NAME: &str = "unipelt";

/// Files by their paths, of an adapter that was taken apart from its head; what they cannot hold is refused with the
/// reason.
pub fn write(
    spec: &UnipeltSpec,
    parts: Option<score::Parts>,
    base: &BaseInfo,
) -> Result<Vec<(String, Vec<u8>)>, MethodError> {
    let class = class(spec, base)?;
    let Some(score::Parts { files, head, tensors: weights }) = parts else {
        return Err(MethodError::Unsupported("gates that are means over a text need a head that judges it".into()));
    };
    let expected = Part::expected(&super::parts(spec, base)?);
    let values = file::tensors(&files.weights, &expected)?;
    let tensors: Vec<Named> =
        expected.into_iter().zip(values).map(|((name, shape), values)| (renamed(&name), shape, values)).collect();
    let about = |config: Value| {
        let about = json!({
            "config": config, "hidden_size": base.hidden, "model_class": class, "model_name": base.id,
            "model_type": base.architecture, "name": NAME, "version": "adapters.1.3.0",
        });
        let mut bytes = serde_json::to_vec_pretty(&about).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    };
    let weights: Vec<Named> = (weights.into_iter())
        .map(|(name, shape, values)| {
            let kind = if name.ends_with(".bias") { "bias" } else { "weight" };
            (format!("heads.{NAME}.1.{kind}"), shape, values)
        })
        .collect();
    Ok(vec![
        ("adapter_config.json".to_owned(), about(union(spec))),
        ("adapter.safetensors".to_owned(), file::tensor_bytes(&tensors)),
        ("head_config.json".to_owned(), about(head_config(&head))),
        ("model_head.safetensors".to_owned(), file::tensor_bytes(&weights)),
    ])
}

/// The model's class there, or why AdapterHub cannot have such an adapter.
fn class(spec: &UnipeltSpec, base: &BaseInfo) -> Result<&'static str, MethodError> {
    let refused = |why: String| Err(MethodError::Unsupported(format!("AdapterHub has no such adapter: {why}")));
    if spec.gate_mode != GateMode::SequenceMean {
        return refused(
            "its gates are means over a whole text (gate_mode sequence_mean), and this adapter's are each token's own \
             (gate_mode token)"
                .to_owned(),
        );
    }
    if base.heads * base.head_dim != base.hidden {
        let (heads, width, hidden) = (base.heads, base.head_dim, base.hidden);
        return refused(format!(
            "it takes {hidden} / {heads} for the width of a head, which is {width} in {}",
            base.id
        ));
    }
    match base.architecture.as_str() {
        "llama" => Ok("LlamaAdapterModel"),
        "mistral" => Ok("MistralAdapterModel"),
        other => refused(format!("of our families it knows llama and mistral, and {} is {other}", base.id)),
    }
}

/// Our name of a tensor in AdapterHub's words.
fn renamed(name: &str) -> String {
    let name = name.replacen("unipelt.", "model.", 1);
    for (ours, theirs) in [
        ("prefix_tuning.", format!("prefix_tuning.prefix_tunings.{NAME}.self_prefix.")),
        ("prefix_gate.", format!("prefix_tuning.prefix_gates.{NAME}.")),
        ("output_adapter.adapter_down.", format!("output_adapters.adapters.{NAME}.adapter_down.0.")),
        ("output_adapter.", format!("output_adapters.adapters.{NAME}.")),
        ("_proj.", format!("_proj.loras.{NAME}.")),
    ] {
        if name.contains(ours) {
            let name = name.replacen(ours, &theirs, 1);
            // Factors are parameters there, no modules.
            let factor = ["lora_A", "lora_B"].iter().any(|factor| name.contains(factor));
            return if factor { name.trim_end_matches(".weight").to_owned() } else { name };
        }
    }
    name
}

/// What AdapterHub's own defaults say otherwise is written out.
fn union(spec: &UnipeltSpec) -> Value {
    let prefix = json!({
        "architecture": "prefix_tuning", "bottleneck_size": spec.bottleneck_size, "cross_prefix": true, "dropout": 0.0,
        "encoder_prefix": true, "flat": false, "leave_out": [], "non_linearity": "tanh",
        "prefix_length": spec.prefix_length, "shared_gating": true, "use_gating": true,
    });
    let bottleneck = json!({
        "adapter_residual_before_ln": false, "cross_adapter": false, "dropout": 0.0, "init_weights": "bert",
        "inv_adapter": null, "inv_adapter_reduction_factor": null, "is_parallel": false, "leave_out": [],
        "ln_after": false, "ln_before": false, "mh_adapter": false, "non_linearity": "relu",
        "original_ln_after": true, "original_ln_before": true, "output_adapter": true, "phm_layer": false,
        "reduction_factor": spec.reduction_factor, "residual_before_ln": true, "scaling": 1.0, "use_gating": true,
    });
    let lora = json!({
        // With a gate, alpha has no effect.
        "alpha": spec.lora_r, "architecture": "lora", "attn_matrices": ["q", "v"], "composition_mode": "add",
        "dropout": 0.0, "init_weights": "lora", "intermediate_lora": false, "leave_out": [], "output_lora": false,
        "r": spec.lora_r, "selfattn_lora": true, "use_dora": false, "use_gating": true,
    });
    json!({"architecture": "union", "configs": [prefix, bottleneck, lora]})
}

fn head_config(head: &TaskHead) -> Value {
    let labels: serde_json::Map<String, Value> =
        head.labels().iter().enumerate().map(|(i, label)| (label.clone(), json!(i))).collect();
    let mut config = json!({
        "activation_function": null, "dropout_prob": 0.0, "layers": 1, "num_labels": head.width(),
        "label2id": if labels.is_empty() { Value::Null } else { Value::Object(labels) },
    });
    match head {
        TaskHead::Token { .. } => config["head_type"] = json!("tagging"),
        TaskHead::Score | TaskHead::Sequence { .. } => {
            config["head_type"] = json!("classification");
            config["bias"] = json!(false);
            config["use_pooler"] = json!(false);
        }
    }
    config
}

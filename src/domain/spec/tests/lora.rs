//! What the LoRA family refuses, by the field.

use super::*;

#[test]
fn refusals_of_the_family_name_the_field() {
    let cases = [
        (json!({"init_lora_weights": "pissa_niter_65"}), "adapter.init_lora_weights", "0 to 64"),
        (
            json!({"init_lora_weights": "pissa", "use_rslora": true, "rank_pattern": {"q_proj": 3}}),
            "adapter.init_lora_weights",
            "rank_pattern",
        ),
        (json!({"init_lora_weights": "pissa", "r": 97}), "adapter.r", "2 · 97 is more than model.layers.0.self_attn.k"),
        (json!({"type": "dora", "init_lora_weights": "pissa"}), "adapter.init_lora_weights", "dora"),
        (json!({"loraplus_lr_ratio": 0.5}), "adapter.loraplus_lr_ratio", "1 to 1000"),
        (json!({"type": "dora", "r": 0}), "adapter.r", "at least 1"),
        (json!({"type": "dora", "target_modules": ["embed_tokens"]}), "adapter.target_modules", "lora"),
        (
            json!({"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"}),
            "adapter.init_lora_weights",
            "pissa",
        ),
        (json!({"modules_to_save": ["norm"]}), "adapter.modules_to_save", "whole path: model.norm"),
        (json!({"modules_to_save": ["score"]}), "adapter.modules_to_save", "score is no module of small"),
        (json!({"modules_to_save": [""]}), "adapter.modules_to_save", "no module"),
        (
            json!({"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "lm_head"]}),
            "adapter.modules_to_save",
            "also in target_modules",
        ),
        (
            json!({"trainable_token_indices": [49152]}),
            "adapter.trainable_token_indices",
            "below the vocabulary of 49152",
        ),
        (json!({"trainable_token_indices": [3, 4, 3]}), "adapter.trainable_token_indices", "twice"),
        (json!({"trainable_token_indices": []}), "adapter.trainable_token_indices", "empty"),
        (
            json!({"trainable_token_indices": [3], "modules_to_save": ["lm_head"]}),
            "adapter.trainable_token_indices",
            "another change",
        ),
        (json!({"trainable_token_indices": [-3]}), "adapter.trainable_token_indices[0]", "invalid value"),
        (json!({"loraplus_lr_embedding": 2}), "adapter.loraplus_lr_embedding", "0 to 1"),
    ];
    for (adapter, param, text) in cases {
        let (named, message) = refusal(adapter.clone());
        assert_eq!(named, param, "{adapter}: {message}");
        assert!(message.contains(text), "{adapter}: {message}");
    }
}

//! What full fine-tuning refuses.

use super::*;

#[test]
fn full_is_for_small_dense_bases_of_plain_families() {
    let refusal = |base: BaseInfo| {
        let spec = MethodSpec::from_json(&json!({"type": "full"})).unwrap();
        spec.check(&base).map_err(|error| (error.param, error.message))
    };
    let dense = || BaseInfo { storage: "BF16".into(), parameters: 250_000_000, ..base() };
    assert_eq!(refusal(dense()), Ok(()));
    for (base, part) in [
        (BaseInfo { parameters: 250_000_001, ..dense() }, "250000001 weights, above full's limit of 250000000"),
        (BaseInfo { architecture: "gemma3".into(), ..dense() }, "mistral, qwen2, qwen3, and small is gemma3"),
        (BaseInfo { storage: "NF4".into(), ..dense() }, "held as NF4"),
        (base(), "which have to be F32, F16, BF16, and small is held as Q4_1"),
    ] {
        let (param, message) = refusal(base).unwrap_err();
        assert_eq!(param, "adapter.type");
        assert!(message.contains(part), "{message}");
    }
    let error = MethodSpec::from_json(&json!({"type": "full", "r": 8})).unwrap_err();
    assert_eq!((error.param.as_str(), error.code), ("adapter.r", "spec_unknown_field"));
    // An objective's own head would leave an output layer of the base's untrained.
    let spec = MethodSpec::from_json(&json!({"type": "full"})).unwrap();
    let judge = ObjectiveSpec::from_json(&json!({"type": "reward_model"})).unwrap();
    assert_eq!(spec.check_objective(&dense(), &judge), Ok(()));
    let untied = BaseInfo { tied: false, ..dense() };
    assert_eq!(spec.check_objective(&untied, &judge).unwrap_err().param, "adapter.type");
}

//! What holds of every method's knobs, and which methods go with which objectives.

use super::*;

/// Every knob that a method has is named where what it is given is no value of it.
#[test]
fn every_knob_is_named() {
    for spec in MethodSpec::all() {
        let Value::Object(knobs) = serde_json::to_value(&spec).unwrap() else { panic!() };
        for key in knobs.keys().filter(|key| *key != "type") {
            let (param, message) = refusal(json!({"type": spec.type_name(), key: [[{}]]}));
            assert!(param.starts_with(&format!("adapter.{key}")), "{} {key}: {param}: {message}", spec.type_name());
        }
    }
}

/// A token that sees those behind it belongs under a head: there is no writing with it.
#[test]
fn gates_of_a_whole_text_need_a_head() {
    let spec = MethodSpec::from_json(&json!({"type": "unipelt", "gate_mode": "sequence_mean"})).unwrap();
    spec.check(&base()).unwrap();
    for objective in ObjectiveSpec::all() {
        let found = spec.check_objective(&base(), &objective);
        match objective.head() {
            Some(_) => assert_eq!(found, Ok(())),
            None => {
                let error = found.unwrap_err();
                assert_eq!((error.param.as_str(), error.code), ("adapter.gate_mode", "spec_conflict"));
                assert!(error.message.contains(objective.type_name()), "{error}");
            }
        }
    }
}

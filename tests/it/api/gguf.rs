//! GGUF through the wire: merged models, llama.cpp's adapter file, and what each field refuses.

use attune::{
    formats::{Storage, gguf::Gguf},
    model::Base,
};
use candle_core::quantized::GgmlDType;
use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::support::{
    quantised,
    server::{BASE, Client, Server},
    tiny::Tiny,
};

/// The id of a base in a GGUF file.
const FILE: &str = "file";

/// The id of a trained adapter.
async fn trained(client: &Client, file: &str, base: &str, adapter: Value) -> String {
    let training = json!({"max_steps": 2, "batch_size": 4, "learning_rate": 0.02});
    let body = json!({"model": base, "training_file": file, "adapter": adapter, "training": training});
    let job = client.post("/v1/fine_tuning/jobs", &body).await.ok();
    let job = client.end_of(job["id"].as_str().unwrap()).await;
    let model = job["fine_tuned_model"].as_str().unwrap_or_else(|| panic!("{job}"));
    client.get(&format!("/v1/adapters/{model}")).await.ok()["id"].as_str().unwrap().to_owned()
}

/// The bytes of an attachment, whose name ends so.
async fn attached(response: Response, ending: &str) -> Vec<u8> {
    let response = response.error_for_status().unwrap();
    let name = response.headers()["content-disposition"].to_str().unwrap().to_owned();
    assert!(name.ends_with(&format!("{ending}\"")), "{name}");
    response.bytes().await.unwrap().to_vec()
}

#[tokio::test]
async fn adapters_leave_as_gguf() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base.gguf");
    quantised::write(&Tiny::default(), &path, GgmlDType::Q4_1);
    let server = Server::with(&["--model", &format!("{FILE}={}", path.display())]);
    let client = server.client();
    let rows = client.file(7).await;
    let lora = trained(&client, &rows, FILE, json!({"r": 3, "alpha": 7})).await;

    let merge = format!("/v1/adapters/{lora}/merge");
    let merged = async |body: Value, ending: &str| {
        attached(client.request(Method::POST, &merge).json(&body).send().await.unwrap(), ending).await
    };
    let base = Gguf::open(&path).unwrap();
    for (body, storage) in [
        (json!({"format": "gguf"}), Storage::F16),
        (json!({"format": "gguf", "outtype": "q8_0"}), Storage::Q8_0),
        (json!({"format": "gguf", "outtype": "base"}), Storage::Q4_1),
    ] {
        let bytes = merged(body, "-merged.gguf").await;
        let file = Gguf::from_bytes(bytes.clone()).unwrap();
        let name = "blk.1.ffn_down.weight";
        assert_eq!(file.tensor(name).unwrap().storage, storage);
        assert_ne!(file.tensor(name).unwrap().data, base.tensor(name).unwrap().data);
        assert_eq!(file.array("tokenizer.ggml.tokens"), base.array("tokenizer.ggml.tokens"));
        let place = dir.path().join("merged.gguf");
        std::fs::write(&place, bytes).unwrap();
        assert!(Base::open("merged", &place).unwrap().info.tied);
    }
    // The body may be left out, be empty, or say what happens anyway.
    let bare = attached(client.request(Method::POST, &merge).send().await.unwrap(), "-merged.zip").await;
    assert_eq!(merged(json!({}), "-merged.zip").await, bare);
    assert_eq!(merged(json!({"format": "safetensors", "outtype": null}), "-merged.zip").await, bare);

    let download = format!("/v1/adapters/{lora}/download?as=gguf");
    let bytes = attached(client.request(Method::GET, &download).send().await.unwrap(), ".gguf").await;
    let file = Gguf::from_bytes(bytes).unwrap();
    assert_eq!((file.str("general.type"), file.tensor_names().count()), (Some("adapter"), 2 * 2 * 7));

    for (body, code, param, part) in [
        (json!({"format": "zip"}), "out_of_range", "format", "neither safetensors nor gguf"),
        (json!({"format": 3}), "invalid_type", "format", "string"),
        (json!({"format": "gguf", "outtype": "q4_k"}), "out_of_range", "outtype", "f32, f16, bf16, q8_0 and base"),
        (json!({"outtype": "f16"}), "unsupported_parameter", "outtype", "safetensors are F32"),
        (json!({"dtype": "f16"}), "unknown_parameter", "dtype", "dtype"),
    ] {
        let message = client.post(&merge, &body).await.error(400, code, Some(param));
        assert!(message.contains(part), "{body}: {message}");
    }
    client.post(&merge, &json!([])).await.error(400, "invalid_json", None);
    let text = client.request(Method::POST, &merge).body("format=gguf");
    crate::support::server::answer(text).await.error(415, "unsupported_media_type", None);
    let bad = async |query: &str, code: &str, param: &str| {
        client.get(&format!("/v1/adapters/{lora}/download?{query}")).await.error(400, code, Some(param))
    };
    assert!(bad("as=onnx", "out_of_range", "as").await.contains("none of lora, gguf and adapterhub"));
    assert!(bad("as=gguf&format=tar", "unsupported_parameter", "format").await.contains("not packed"));

    // What is no change of weights, no plain LoRA, or has no file to be like.
    let gguf = json!({"format": "gguf"});
    let prompt = trained(&client, &rows, FILE, json!({"type": "prompt_tuning", "num_virtual_tokens": 4})).await;
    let refusal = client.post(&format!("/v1/adapters/{prompt}/merge"), &gguf).await;
    assert!(refusal.error(400, "not_mergeable", Some("adapter_id")).contains("no change of the base's weights"));
    for (adapter, part) in [
        (json!({"type": "ia3"}), "not a low-rank matrix"),
        (json!({"r": 3, "alpha": 7, "target_modules": ["q_proj", "lm_head"]}), "tied base"),
    ] {
        let id = trained(&client, &rows, FILE, adapter).await;
        let refusal = client.get(&format!("/v1/adapters/{id}/download?as=gguf")).await;
        let message = refusal.error(400, "unsupported", Some("as"));
        assert!(message.contains(part), "{message}");
    }
    let folder = trained(&client, &rows, BASE, json!({"r": 3, "alpha": 7})).await;
    let refusal = client.post(&format!("/v1/adapters/{folder}/merge"), &gguf).await;
    assert!(refusal.error(400, "not_mergeable", Some("adapter_id")).contains("read from a directory"));
    let download = client.request(Method::GET, &format!("/v1/adapters/{folder}/download?as=gguf"));
    attached(download.send().await.unwrap(), ".gguf").await;
}

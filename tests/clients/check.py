"""lm-eval's `local-completions`, langchain-openai and guidellm against a running server.

    attune serve &                                       # with the built-in base, or any other
    python3 tests/clients/check.py URL KEY MODEL GGUF    # GGUF: the base's file, for its tokenizer

Outside CI: it takes packages of some gigabytes, which have to be there: lm-eval[api], transformers, gguf,
langchain-openai, and the command guidellm (0.8.1; `GUIDELLM` says where, if it is not on the path). Prints what each
client found, and `done`. What guidellm measures are its own requests on this machine as it is: no benchmark of ours.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

url, key, model, gguf = sys.argv[1:]
os.environ["OPENAI_API_KEY"] = key
QUESTIONS = [
    ("The capital of France is", [" Paris", " Berlin", " a banana"], 0),
    ("Two plus two is", [" green", " four", " seven"], 1),
    ("The opposite of hot is", [" cold", " table", " seven"], 0),
    ("Water freezes at zero degrees", [" of music", " Celsius", " Paris"], 1),
]


def post(path, body):
    request = urllib.request.Request(
        f"{url}{path}", json.dumps(body).encode(), {"Authorization": f"Bearer {key}", "Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))


def score(context, ending):
    """The ending's log-probability behind the context, asked directly."""
    answer = post("/v1/completions", {"model": model, "prompt": context + ending, "max_tokens": 0, "echo": True, "logprobs": 0})
    found = answer["choices"][0]["logprobs"]
    return sum(p for p, at in zip(found["token_logprobs"], found["text_offset"]) if at >= len(context))


def lm_eval_check(place, tokenizer):
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"context": c, "choices": choices, "gold": gold} for c, choices, gold in QUESTIONS]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(place / "rows.jsonl")}}, "test_split": "test",
        "doc_to_text": "{{context}}", "target_delimiter": "",
    }
    choice = {**common, "task": "attune_choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
              "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}]}
    write = {**common, "task": "attune_write", "output_type": "generate_until", "doc_to_target": "{{choices[gold]}}",
             "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}]}
    arguments = {"model": model, "base_url": f"{url}/v1/completions", "tokenizer": str(tokenizer), "num_concurrent": 2,
                 "tokenized_requests": False, "max_length": 1024}
    found = lm_eval.simple_evaluate(
        model="local-completions", model_args=arguments, tasks=[choice, write], task_manager=TaskManager(),
        bootstrap_iters=0, log_samples=True)
    for sample in found["samples"]["attune_choice"]:
        context, choices = sample["doc"]["context"], sample["doc"]["choices"]
        for ending, (said, _) in zip(choices, sample["filtered_resps"]):
            asked = score(context, ending)
            assert math.isclose(float(said), asked, abs_tol=1e-2), (context, ending, said, asked)
    written = [sample["resps"][0][0] for sample in found["samples"]["attune_write"]]
    assert all(written), written
    print("lm-eval: accuracy", found["results"]["attune_choice"]["acc,none"], "written", written)


def langchain_check():
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

    chat = ChatOpenAI(model=model, base_url=f"{url}/v1", temperature=0, max_tokens=8)
    whole = chat.invoke("Say hello.")
    pieces = "".join(piece.content for piece in chat.stream("Say hello."))
    assert whole.content and pieces == whole.content, (whole, pieces)
    assert whole.usage_metadata["output_tokens"] > 0, whole
    schema = {"title": "answer", "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
              "additionalProperties": False}
    held = ChatOpenAI(model=model, base_url=f"{url}/v1", temperature=0, max_tokens=40)
    made = held.with_structured_output(schema, method="json_schema").invoke("How many legs has a cat?")
    assert isinstance(made["n"], int), made
    text = OpenAI(model=model, base_url=f"{url}/v1", temperature=0, max_tokens=4).invoke("The capital of France is")
    assert text, text
    vectors = OpenAIEmbeddings(model=model, base_url=f"{url}/v1", check_embedding_ctx_length=False).embed_documents(["a", "b"])
    assert len(vectors) == 2 and math.isclose(sum(x * x for x in vectors[0]), 1, abs_tol=1e-3)
    print("langchain:", repr(whole.content), made, repr(text), len(vectors[0]))


def guidellm_check(place, tokenizer):
    """Streams of four users at once, in chat and in completions."""
    for path in ("/v1/chat/completions", "/v1/completions"):
        backend = {"kind": "openai_http", "target": url, "model": model, "api_key": key, "request_format": path,
                   "validate_backend": False}
        subprocess.run(
            [os.environ.get("GUIDELLM", "guidellm"), "run", "--backend", json.dumps(backend),
             "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=12",
             "--data", "kind=synthetic_text,prompt_tokens=48,output_tokens=16",
             "--tokenizer", f"kind=hf_auto,model={tokenizer}", "--output", f"kind=json,path={place}/found.json",
             "--disable-console"], check=True)
        found = json.loads((place / "found.json").read_text())["benchmarks"][0]
        print("guidellm:", path, found)


def tokenizer_of(place):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(Path(gguf).parent), gguf_file=Path(gguf).name).save_pretrained(place / "tokenizer")
    return place / "tokenizer"


with tempfile.TemporaryDirectory() as place:
    langchain_check()
    tokenizer = tokenizer_of(Path(place))
    guidellm_check(Path(place), tokenizer)
    lm_eval_check(Path(place), tokenizer)
print("done")

"""llama.cpp loads what we write as GGUF, and answers like the adapter.

    python3 -m venv env && env/bin/pip install xllamacpp gguf requests
    env/bin/python tests/gguf/check.py ATTUNE MODEL.gguf      # the program, and a small model of the llama family

Outside CI. Twice, on MODEL itself and on a tiny random model that borrows its tokenizer: a random LoRA (alpha is not the
rank, one rank and one alpha are their modules' own) is imported and asked for log-probabilities; so is llama.cpp, with
the base and the adapter file (`?as=gguf`), and with each merged model (`POST …/merge`). Two distances are taken, of
log-probabilities of tokens that both sides name: of llama.cpp from us on the same file, which is how the two programs
differ, and of the file from the adapter, both in our hands, which is what the format loses. Prints every distance, and
`done`; LIMITS says what was measured.
"""

import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import gguf
import numpy as np
import requests
import xllamacpp

PROGRAM, MODEL = sys.argv[1], Path(sys.argv[2]).resolve()
KEY = "a-key-of-twenty-letters"
PROMPTS = ["The capital of France is", "Once upon a time, there was a", "def add(a, b):\n    return", "1 2 3 4 5"]
TOP = 20
RANK, ALPHA, RANKS, ALPHAS = 3, 7, {"q_proj": 2}, {"down_proj": 5}
# The most that the two distances may be: twice what was measured with SmolLM2-135M-Instruct in Q4_1 and xllamacpp
# 2026.10.11549, or more. Measured were, on the tiny model and on it:
#
#            programs            format
#   adapter  1.2e-4   4.3e-1     -
#   f32      1.1e-4   2.0e-4     1.0e-5   2.0e-5
#   f16      1.0e-2   1.1e-2     1.5e-2   9.4e-3
#   bf16     9.8e-2   1.0e-1     8.7e-2   4.8e-2
#   q8_0     3.5e-1   3.8e-1     4.2e-1   2.1e-1
#   base     1.1e-4   4.3e-1     1.0e-5   1.4
#
# The programs differ because llama.cpp rounds what it multiplies a matrix with to the matrix' own kind (0.31 on the bare
# Q4_1 base), and we do not with --exact. A base in few bits is quantised again, and loses most of a small change.
COMMON = {"f32": (5e-4, 1e-4), "f16": (2.5e-2, 3e-2), "bf16": (0.2, 0.2), "q8_0": (0.8, 0.9)}
LIMITS = {"tiny": {"adapter": (5e-4, 1e-4), **COMMON, "base": (5e-4, 1e-4)},
          "real": {"adapter": (0.9, 1e-4), **COMMON, "base": (0.9, 3)}}


def tiny(path):
    """A random model of the llama family with MODEL's tokenizer, all in F32."""
    source, random = gguf.GGUFReader(MODEL), np.random.default_rng(1)
    hidden, inner, layers, heads, kv_heads = 64, 96, 2, 4, 2
    kv = hidden // heads * kv_heads
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in source.fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    vocab = len(source.fields["tokenizer.ggml.tokens"].contents())
    tensors = {"token_embd": (vocab, hidden), "output_norm": (hidden,)}
    for i in range(layers):
        linears = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
                   "attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
                   "ffn_down": (hidden, inner), "attn_norm": (hidden,), "ffn_norm": (hidden,)}
        tensors.update({f"blk.{i}.{name}": shape for name, shape in linears.items()})
    for name, shape in tensors.items():
        values = random.standard_normal(shape).astype(np.float32)
        values = 1 + 0.1 * values if len(shape) == 1 else values * (0.5 if name == "token_embd" else 1.5 / shape[1] ** 0.5)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def lora(path):
    """A random LoRA on all linears of a model, as a zip of PEFT's directory."""
    reader, random = gguf.GGUFReader(path), np.random.default_rng(2)
    modules = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
               "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
               "ffn_down": "mlp.down_proj"}
    tensors = {}
    for tensor in reader.tensors:
        part = tensor.name.split(".")
        if part[0] != "blk" or part[2] not in modules:
            continue
        inputs, outputs = (int(n) for n in tensor.shape)
        module = f"base_model.model.model.layers.{part[1]}.{modules[part[2]]}"
        rank = RANKS.get(module.rsplit(".", 1)[1], RANK)
        tensors[f"{module}.lora_A.weight"] = random.standard_normal((rank, inputs)) / inputs ** 0.5
        tensors[f"{module}.lora_B.weight"] = random.standard_normal((outputs, rank)) * 0.15
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "rank_pattern": RANKS,
              "alpha_pattern": ALPHAS, "target_modules": [name.rsplit(".", 1)[1] for name in modules.values()]}
    header, body = {}, b""
    for name, values in tensors.items():
        data = values.astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("adapter_config.json", json.dumps(config))
        archive.writestr("adapter_model.safetensors", struct.pack("<Q", len(text)) + text + body)
    return packed.getvalue()


class Attune:
    def __init__(self, place, models):
        arguments = [argument for name, path in models.items() for argument in ("--model", f"{name}={path}")]
        environment = {**os.environ, "ATTUNE_API_KEY": KEY, "ATTUNE_DATA_DIR": str(place / "data")}
        command = [PROGRAM, "serve", "--listen", "127.0.0.1:0", "--exact", "--workers", "0", *arguments]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        line = next(line for line in self.process.stdout if line.startswith("listening on "))
        self.url = line.split()[2]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def ask(self, method, path, **body):
        answer = requests.request(method, self.url + path, headers={"Authorization": f"Bearer {KEY}"}, **body)
        assert answer.ok, f"{path}: {answer.text}"
        return answer

    def scores(self, model):
        def of(prompt):
            body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": TOP}
            return self.ask("POST", "/v1/completions", json=body).json()["choices"][0]["logprobs"]["top_logprobs"][0]

        return [of(prompt) for prompt in PROMPTS]


def llama(model, adapter=None):
    """llama.cpp's scores, all in F32 that it lets us choose."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup, params.verbosity = 256, 1, 0, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), 1.0
        params.lora_adapters = [info]
    server = xllamacpp.Server(params)

    def of(prompt):
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": TOP, "cache_prompt": False}
        found = server.handle_completions(body)
        found = json.loads(found) if isinstance(found, str) else found
        first = found["choices"][0]["logprobs"]["content"][0]
        return {entry["token"]: entry["logprob"] for entry in first["top_logprobs"]}

    return [of(prompt) for prompt in PROMPTS]


def apart(some, others):
    """The largest difference of a token that both name; at least half of the tokens are."""
    most = 0.0
    for a, b in zip(some, others):
        both = a.keys() & b.keys()
        assert len(both) >= TOP // 2, f"only {len(both)} of {TOP} tokens in common: {a} {b}"
        most = max(most, *(abs(a[token] - b[token]) for token in both))
    return most


def best(some):
    return [max(scores, key=scores.get) for scores in some]


def check(attune, place, name, path):
    form = {"files": {"file": ("adapter.zip", lora(path))}, "data": {"model": name}}
    adapter = attune.ask("POST", "/v1/adapters", **form).json()
    base, tuned = attune.scores(name), attune.scores(adapter["model"])
    print(f"{name}: bare base: programs {apart(llama(path), base):.1e}; best tokens {best(base)} -> {best(tuned)}", flush=True)
    assert best(base) != best(tuned), "the adapter changes too little to be seen"
    for form, limits in LIMITS[name].items():
        written = place / f"{name}-{form}.gguf"
        if form == "adapter":
            written.write_bytes(attune.ask("GET", f"/v1/adapters/{adapter['id']}/download?as=gguf").content)
            found, own = llama(path, written), tuned
        else:
            body = {"format": "gguf", "outtype": form}
            written.write_bytes(attune.ask("POST", f"/v1/adapters/{adapter['id']}/merge", json=body).content)
            found = llama(written)
            with Attune(place / form, {"written": written}) as other:
                own = other.scores("written")
        written.unlink()
        distances = apart(found, own), apart(own, tuned)
        print(f"{name}: {form:7} programs {distances[0]:.1e}, format {distances[1]:.1e}, best tokens {best(found)}", flush=True)
        for what, distance, limit in zip(("programs", "format"), distances, limits):
            assert distance < limit, f"{name} {form}: {what} are {distance} apart, above {limit}"


with tempfile.TemporaryDirectory() as folder:
    place = Path(folder)
    tiny(place / "tiny.gguf")
    models = {"tiny": place / "tiny.gguf", "real": MODEL}
    with Attune(place, models) as attune:
        for name, path in models.items():
            check(attune, place, name, path)
print("done")

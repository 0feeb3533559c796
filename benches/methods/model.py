"""A small Llama made from a seed, in Hugging Face layout, and its weights rounded to 4 bits. Needs nothing installed."""

import array
import bisect
import json
import random
import struct
from pathlib import Path

from tasks import VOCABULARY

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD = 256, 704, 6, 8, 4, 32
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
VOCAB = 256 + len(SPECIALS) + len(VOCABULARY)
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# The 16 values of bitsandbytes' `get_4bit_type`, sorted.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4 = sorted({sign * size for sign in (-1, 1) for size in (0, 0.0625 / 12, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25)})
BLOCK = 64


def write(folder, seed):
    """Weights like those that trainings begin with."""
    rng = random.Random(seed)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        for name, out, width in [("self_attn.q_proj", HEADS * HEAD, HIDDEN), ("self_attn.k_proj", KV_HEADS * HEAD, HIDDEN),
                                 ("self_attn.v_proj", KV_HEADS * HEAD, HIDDEN), ("self_attn.o_proj", HIDDEN, HEADS * HEAD),
                                 ("mlp.gate_proj", INNER, HIDDEN), ("mlp.up_proj", INNER, HIDDEN),
                                 ("mlp.down_proj", HIDDEN, INNER)]:
            shapes[f"model.layers.{layer}.{name}.weight"] = (out, width)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            values = array.array("f", [1.0]) * shape[0]
        else:
            deviation = 0.05 if "embed" in name or "head" in name else shape[1] ** -0.5
            values = array.array("f", (rng.gauss(0.0, deviation) for _ in range(shape[0] * shape[1])))
        tensors[name] = (shape, values)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "max_position_embeddings": 1024, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "bos_token_id": 256, "eos_token_id": 258,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": SPECIALS[0], "eos_token": SPECIALS[2], "pad_token": SPECIALS[3], "add_bos_token": False,
        "chat_template": TEMPLATE}))
    save(folder / "model.safetensors", tensors)


def tokenizer():
    """Bytes, each under GPT-2's printable stand-in, and the tasks' words, each with the space before it (`Ġ`)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    characters = [chr(byte if byte in plain else next(others)) for byte in range(256)]
    vocabulary = {c: i for i, c in enumerate(characters)}
    vocabulary |= {f"Ġ{word}": 256 + len(SPECIALS) + i for i, word in enumerate(VOCABULARY)}
    level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    added = [{"id": 256 + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, name in enumerate(SPECIALS)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {**level, "add_prefix_space": False}, "post_processor": None,
            "decoder": {**level, "add_prefix_space": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": True, "vocab": vocabulary, "merges": []}}


def save(path, tensors):
    header, end = {}, 0
    for name, (shape, values) in tensors.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * len(values)]}
        end += 4 * len(values)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, values in tensors.values():
            file.write(values.tobytes())


def load(data):
    """Tensors of the bytes of a file of F32."""
    length, = struct.unpack_from("<Q", data)
    header = json.loads(data[8:8 + length])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            values = array.array("f")
            values.frombytes(data[begin:end])
            tensors[name] = (tuple(entry["shape"]), values)
    return tensors


def rounded(values, codes):
    """Each number at the nearest code times its block's largest."""
    middles = [(a + b) / 2 for a, b in zip(codes, codes[1:])]
    found = array.array("f")
    for start in range(0, len(values), BLOCK):
        block = values[start:start + BLOCK]
        most = max(map(abs, block)) or 1.0
        found.extend(codes[bisect.bisect_left(middles, value / most)] * most for value in block)
    return found

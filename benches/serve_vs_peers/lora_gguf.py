"""A LoRA adapter as llama.cpp reads it: GGUF, F32, what its own `convert_lora_to_gguf.py` writes of a Llama's PEFT files."""

import struct

from adapters import widened

MODULES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
           "up_proj": "ffn_up", "down_proj": "ffn_down"}
ALIGNMENT = 32
STRING, FLOAT32, F32 = 8, 6, 0


def write_lora(path, adapter, head_dim):
    """`head_dim` is the base's: GGUF has the rows of q and k in another order."""
    tensors = []
    for name, (_, shape, data) in adapter.tensors.items():
        layer, module, part = name.split(".")[-5], name.split(".")[-3], name.split(".")[-2]
        data = widened(data)
        if part == "lora_B" and module in ("q_proj", "k_proj"):
            data = interleaved(data, shape[0], head_dim)
        tensors.append((f"blk.{layer}.{MODULES[module]}.weight.{part.lower()}", shape, data))
    values = [("general.type", STRING, "adapter"), ("general.architecture", STRING, "llama"),
              ("adapter.type", STRING, "lora"), ("adapter.lora.alpha", FLOAT32, float(adapter.config["lora_alpha"]))]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for name, kind, value in values:
        head += string(name) + struct.pack("<I", kind)
        head += string(value) if kind == STRING else struct.pack("<f", value)
    end = 0
    for name, shape, data in tensors:
        head += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", F32, end)
        end += len(data) + -len(data) % ALIGNMENT
    with open(path, "wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for _, _, data in tensors:
            file.write(data + bytes(-len(data) % ALIGNMENT))
    return path


def interleaved(data, rows, head_dim):
    """Rows of each head: its first half and its second by turns."""
    width, half = len(data) // rows, head_dim // 2
    order = (head + j + half * second for head in range(0, rows, head_dim) for j in range(half) for second in (0, 1))
    return b"".join(data[width * row:width * (row + 1)] for row in order)


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()

"""Adapters as PEFT's files. A job of one step shows what a method's files look like; the others have the same shapes
and other numbers, which costs milliseconds where training would cost minutes."""

import io
import json
import random
import zipfile
from dataclasses import dataclass

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Made anew for each adapter, and as what; all else stays as it was trained.
SMALL = ("lora_A", "lora_B", "lora_E", "prompt_embeddings")
NEAR_ONE = ("ia3_l",)
SIGNS = bytes(0xBD if byte & 1 else 0x3D for byte in range(256))
# The lower byte of 1.0 to 1.12.
ONES = bytes(0x80 | byte & 0x0F for byte in range(256))


@dataclass
class Adapter:
    config: dict
    # name → (dtype, shape, bytes)
    tensors: dict

    @classmethod
    def unpacked(cls, packed):
        inside = zipfile.ZipFile(io.BytesIO(packed))
        return cls(json.loads(inside.read(CONFIG)), read(inside.read(WEIGHTS)))

    def another(self, seed):
        """The same shapes in bfloat16, with other numbers where they are the adapter's own."""
        rng, tensors = random.Random(seed), {}
        for name, (dtype, shape, data) in self.tensors.items():
            if any(part in name for part in SMALL + NEAR_ONE):
                count = len(data) // (4 if dtype == "F32" else 2)
                dtype, data = "BF16", numbers(rng, count, any(part in name for part in NEAR_ONE))
            tensors[name] = (dtype, shape, data)
        return Adapter(self.config, tensors)

    def bytes(self):
        return sum(len(data) for _, _, data in self.tensors.values())

    def packed(self):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr(CONFIG, json.dumps(self.config))
            archive.writestr(WEIGHTS, written(self.tensors))
        return content.getvalue()

    def directory(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config))
        (folder / WEIGHTS).write_bytes(written(self.tensors))
        return folder


def numbers(rng, count, is_near_one):
    """bfloat16 numbers: of either sign and from 2⁻⁵ to 2⁻³ in size, or a little above 1."""
    data = bytearray(2 * count)
    lower, upper = rng.randbytes(count), rng.randbytes(count)
    data[0::2] = lower.translate(ONES) if is_near_one else lower
    data[1::2] = bytes([0x3F]) * count if is_near_one else upper.translate(SIGNS)
    return bytes(data)


def widened(data):
    """bfloat16 as float32."""
    wide = bytearray(2 * len(data))
    wide[2::4], wide[3::4] = data[0::2], data[1::2]
    return bytes(wide)


def read(content):
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + size])
    header.pop("__metadata__", None)
    body = memoryview(content)[8 + size:]
    return {name: (entry["dtype"], entry["shape"], bytes(body[slice(*entry["data_offsets"])]))
            for name, entry in header.items()}


def written(tensors):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())

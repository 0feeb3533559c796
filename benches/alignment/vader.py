"""A real model learns to sound happy: PPO on SmolLM2-135M, judged by VADER (Hutto and Gilbert 2014) over HTTP.

python3 benches/alignment/vader.py                     # a few minutes on two cores
python3 benches/alignment/vader.py --steps 3           # whether it runs

VADER stands behind an address of its own as an `endpoint` grader: the server sends it each completion and is told its
compound score, -1 to 1. The weight of the divergence from the base is steered towards --kl-target, in nats a completion.
Afterwards openings that were not trained on are completed by both models. The model and VADER come from PyPI.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import setup  # noqa: E402
from server import Server  # noqa: E402

JUDGE = "vaderSentiment==3.3.2"
WHO = ["My neighbour", "The teacher", "A young doctor", "The old captain", "Our guide", "The cook", "A stranger",
       "The woman from the bakery"]
DID = ["said that the day", "wrote that the food", "told me the house", "thought the journey", "said the film",
       "felt that the evening", "remembered that the town", "explained that the work"]
OTHERS = ["The driver", "A friend of mine", "The gardener", "His sister"]
ALSO = ["said the weather", "told us that the book", "wrote that the room", "thought that the music"]


def main():
    args = arguments()
    model, score = args.model or setup.model(), judge()
    binary = args.binary or setup.attune()
    judging = ThreadingHTTPServer(("127.0.0.1", 0), handler(score))
    threading.Thread(target=judging.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{judging.server_port}"
    openings = [{"messages": question(f"{who} {did}")} for who in WHO for did in DID]
    held_out = [question(f"{who} {did}") for who in OTHERS for did in ALSO]
    knobs = {"max_completion_length": args.new_tokens, "num_ppo_epochs": args.ppo_epochs, "kl_coef": args.kl_coef,
             "kl_target": args.kl_target, "kl_horizon": args.kl_horizon, "batch_size": args.prompts, "n_epochs": 1000}
    grader = {"type": "endpoint", "name": "vader", "url": f"http://{address}/"}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(binary, folder, {"base": model}, "--outbound-allow", address, "--threads", args.threads)
        try:
            begun = time.time()
            job, metrics, _ = server.run({
                "model": "base", "training_file": server.upload(openings), "seed": args.seed,
                "method": {"type": "ppo", "ppo": {"hyperparameters": knobs, "grader": grader}},
                "adapter": {"type": "lora", "r": 8, "alpha": 16, "target_modules": "all-linear"},
                "training": {"learning_rate": args.rate, "lr_scheduler": "constant", "max_steps": args.steps,
                             "max_seq_len": 128}})
            seconds = time.time() - begun
            texts = {name: complete(server, name, held_out, args) for name in ("base", job["fine_tuned_model"])}
        finally:
            server.stop()
            judging.shutdown()
    report(args, metrics, seconds, score, list(texts.values()))


def question(opening):
    return [{"role": "user", "content": f"Go on with this text: {opening}"}]


def judge():
    """The compound score of a text."""
    folder = setup.PEERS / "vader"
    if not (folder / "vaderSentiment").exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, JUDGE], check=True)
    sys.path.insert(0, str(folder))
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    analyser = SentimentIntensityAnalyzer()
    return lambda text: analyser.polarity_scores(text)["compound"]


def handler(score):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = json.dumps({"score": score(asked["sample"]["output_text"])}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_):
            pass

    return Handler


def complete(server, model, openings, args):
    texts = []
    for i, opening in enumerate(openings):
        body = {"model": model, "messages": opening, "n": 8, "max_tokens": args.new_tokens, "temperature": 1.0, "seed": i}
        texts += [choice["message"]["content"] for choice in server.json("/v1/chat/completions", body)["choices"]]
    return texts


def report(args, metrics, seconds, score, texts):
    print(f"{args.steps} updates of {args.prompts} completions of at most {args.new_tokens} tokens, {seconds:.0f} s; "
          f"{setup.machine()}, {args.threads} threads")
    print("\n| updates | sentiment | KL, nats a completion | its weight |\n|---|---|---|---|")
    size = max(1, len(metrics) // 6)
    for at in range(0, len(metrics), size):
        rows = metrics[at:at + size]
        reward, kl, weight = (statistics.mean(row[name] for row in rows)
                              for name in ("reward", "objective/kl", "objective/kl_coef"))
        print(f"| {at + 1} to {at + len(rows)} | {reward:.3f} | {kl:.2f} | {weight:.4f} |")
    print(f"\nThe target is {args.kl_target}; the largest KL of an update's completions was "
          f"{max(row['objective/kl'] for row in metrics):.2f}.")
    for name, group in zip(("base", "tuned"), texts):
        scores = [score(text) for text in group]
        error = statistics.stdev(scores) / len(scores) ** 0.5
        print(f"Held-out openings, {name}: {statistics.mean(scores):.3f} ± {error:.3f}, {len(set(group))} different of "
              f"{len(group)}, such as {group[0]!r}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file")
    parser.add_argument("--binary", help="attune; else it is built")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=8, help="completions of an update")
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--ppo-epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--kl-coef", type=float, default=0.05, help="the first one")
    parser.add_argument("--kl-target", type=float, default=6.0)
    parser.add_argument("--kl-horizon", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


main()

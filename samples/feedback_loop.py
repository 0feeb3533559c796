"""From use to training: answers are kept, judged, and a job trains on the judgements. Prints what changed.

    pip install openai
    attune serve &
    python3 samples/feedback_loop.py http://127.0.0.1:8080/v1 "$KEY"

The judge here stands for a person who likes short answers that come to an end: of four answers to a question, the best
is preferred over the worst. Held-out questions show whether the tuned model has learnt it.
"""

import json
import statistics
import sys
import time
from pathlib import Path

from openai import OpenAI

URL, KEY = sys.argv[1:3]
BASE = sys.argv[3] if len(sys.argv) > 3 else "smollm2-135m-instruct"
LIMIT = 64  # tokens of an answer
client = OpenAI(base_url=URL, api_key=KEY, timeout=600)


def questions():
    rows = (json.loads(line) for line in (Path(__file__).parent / "support.jsonl").read_text().splitlines())
    unique = dict.fromkeys(message["content"] for row in rows for message in row["messages"] if message["role"] == "user")
    return list(unique)


def ask(model, question, n, seed, store=False):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        model=model, messages=messages, n=n, seed=seed, max_tokens=LIMIT, temperature=1.0, store=store)


def cost(choice):
    """What the judge dislikes: length, and answers that do not come to an end."""
    return len(choice.message.content) + (1000 if choice.finish_reason == "length" else 0)


def judge(question, seed):
    answer = ask(BASE, question, 4, seed, store=True)
    ranked = sorted(answer.choices, key=cost)
    best, worst = ranked[0], ranked[-1]
    if best.message.content == worst.message.content or not best.message.content:
        return 0
    body = {"completion_id": answer.id, "choice": best.index, "preferred_over": {"choice": worst.index}}
    client.post("/feedback", body=body, cast_to=object)
    return 1


def measure(model, held_out):
    choices = [choice for i, question in enumerate(held_out) for choice in ask(model, question, 2, 1000 + i).choices]
    ended = sum(choice.finish_reason == "stop" for choice in choices) / len(choices)
    return ended, statistics.mean(len(choice.message.content) for choice in choices)


def main():
    asked = questions()
    train, held_out = asked[:60], asked[60:80]
    begun = time.time()
    pairs = sum(judge(question, seed) for seed, question in enumerate(train))
    print(f"{pairs} pairs from {len(train)} questions")
    body = {
        "model": BASE,
        "feedback": {"since": int(begun), "model": BASE},
        "suffix": "short",
        "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 2, "batch_size": 4}}},
        "adapter": {"type": "lora", "r": 8, "alpha": 16},
        "training": {"learning_rate": 2e-4},
    }
    job = client.post("/fine_tuning/jobs", body=body, cast_to=object)
    while job["status"] not in ("succeeded", "failed", "cancelled"):
        time.sleep(1)
        job = client.get(f"/fine_tuning/jobs/{job['id']}", cast_to=object)
    assert job["status"] == "succeeded", job["error"]
    events = client.get(f"/fine_tuning/jobs/{job['id']}/events?limit=100", cast_to=object)["data"]
    metrics = [event["data"] for event in reversed(events) if event["type"] == "metrics"]
    for row in (metrics[0], metrics[-1]):
        print(f"step {row['step']}: loss {row['train_loss']:.3f}, accuracy {row['rewards/accuracies']:.2f}, "
              f"margin {row['rewards/margins']:.3f}")
    for name, model in (("base", BASE), ("tuned", job["fine_tuned_model"])):
        ended, length = measure(model, held_out)
        print(f"{name}: {ended:.0%} of the answers come to an end within {LIMIT} tokens, {length:.0f} characters long")


main()

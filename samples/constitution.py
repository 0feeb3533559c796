"""Constitutional revision: a model answers, criticises its answer by a principle, writes it again, and learns from that.

    pip install openai
    attune serve &
    python3 samples/constitution.py http://127.0.0.1:8080/v1 "$KEY" [MODEL [CRITIC]]

The first half of "Constitutional AI" (Bai et al., arXiv 2212.08073). Each question goes through ROUNDS rounds, each with
a principle drawn from PRINCIPLES; what stands at the end becomes a supervised row. CRITIC (default: MODEL) may be another
base or a tuned model; a model of 135 million weights has little to say, so name the best that is resident. The second
half, labels by a judge, is POST /v1/preferences with the principles as `criteria`, and a dpo job on its file.
"""

import json
import random
import sys
import time
from pathlib import Path

from openai import OpenAI

URL, KEY = sys.argv[1:3]
MODEL = sys.argv[3] if len(sys.argv) > 3 else "smollm2-135m-instruct"
CRITIC = sys.argv[4] if len(sys.argv) > 4 else MODEL
QUESTIONS, ROUNDS, LIMIT = 24, 1, 64
PRINCIPLES = [
    "The answer should be short and come to an end.",
    "The answer should be polite and answer the question that was asked.",
    "The answer should promise nothing that a support desk cannot keep.",
]
client = OpenAI(base_url=URL, api_key=KEY, timeout=600)


def questions():
    rows = (json.loads(line) for line in (Path(__file__).parent / "support.jsonl").read_text().splitlines())
    asked = (message["content"] for row in rows for message in row["messages"] if message["role"] == "user")
    return list(dict.fromkeys(asked))[:QUESTIONS]


def say(model, text, seed):
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], max_tokens=LIMIT, temperature=0.7, seed=seed)
    return answer.choices[0].message.content.strip()


def revised(question, seed):
    """The answer after each round's criticism."""
    drawn, answer = random.Random(seed), say(MODEL, question, seed)
    for turn in range(ROUNDS):
        about = f"Question: {question}\n\nAnswer: {answer}\n\nPrinciple: {drawn.choice(PRINCIPLES)}\n\n"
        criticism = say(CRITIC, about + "In which way does the answer fall short of the principle?", seed + turn)
        wish = f"{about}Criticism: {criticism}\n\nWrite the answer again so that it keeps to the principle. Answer only."
        answer = say(CRITIC, wish, seed + turn) or answer
    return answer


def main():
    rows = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for seed, question in enumerate(questions()) if (answer := revised(question, seed))]
    print(f"{len(rows)} revised answers; the first: {rows[0]['messages'][1]['content']!r}")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file = client.files.create(file=("revised.jsonl", text.encode()), purpose="fine-tune")
    body = {"model": MODEL, "training_file": file.id, "suffix": "revised",
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
            "adapter": {"type": "lora", "r": 8, "alpha": 16}}
    job = client.post("/fine_tuning/jobs", body=body, cast_to=object)
    while job["status"] not in ("succeeded", "failed", "cancelled"):
        time.sleep(1)
        job = client.get(f"/fine_tuning/jobs/{job['id']}", cast_to=object)
    assert job["status"] == "succeeded", job["error"]
    print(f"{job['fine_tuned_model']} learnt from {job['trained_tokens']} tokens")


main()

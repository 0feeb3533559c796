#!/usr/bin/env python3
"""Writes the sample dataset beside this file: `python3 samples/make.py`.

Customers write to the support desk of Northwind Outfitters, a small shop that does not exist. The desk answers in a
house style: one JSON object with exactly the keys category, priority and reply; the reply is one sentence and ends
with the house's sign-off. Category and priority follow from the question. The same seed gives the same bytes.

The held-out rows are made from words and wordings that no training row has.
"""

import json
import random
from pathlib import Path

SIGN_OFF = "Yours, Northwind"

# For each category: the reply, and ways to ask. The first wordings are trained on, the last two are held out.
CATEGORIES = {
    "delivery": {
        "reply": "we are tracing your {item} with the courier today.",
        "ask": [
            "Where is my {item}?",
            "My {item} has not arrived yet.",
            "When will the {item} be delivered?",
            "The tracking of my {item} has not moved for days.",
            "I am still waiting for my {item}.",
            "The courier left without my {item}.",
            "Has my {item} been shipped?",
            "Why is the delivery of my {item} late?",
        ],
        "held_out": ["Is my {item} still on its way?", "The parcel with my {item} is late."],
    },
    "returns": {
        "reply": "you can send the {item} back within 30 days for free.",
        "ask": [
            "I want to return the {item}.",
            "Can I send the {item} back?",
            "How do I return my {item}?",
            "I would like my money back for the {item}.",
            "Please refund the {item}.",
            "I do not like the {item} and want a refund.",
            "Where do I send the {item} I am returning?",
            "How long can I return the {item}?",
        ],
        "held_out": ["I would like to give the {item} back.", "Can I get a refund for the {item}?"],
    },
    "sizes": {
        "reply": "we will exchange the {item} for the size you need.",
        "ask": [
            "The {item} is too small.",
            "The {item} is too large for me.",
            "Which size of {item} should I order?",
            "Can I swap the {item} for a larger size?",
            "Does the {item} run small?",
            "I need the {item} one size up.",
            "The {item} does not fit me.",
            "Do you have the {item} in a smaller size?",
        ],
        "held_out": ["The {item} is too tight, I need a bigger size.", "What size is best for the {item}?"],
    },
    "damage": {
        "reply": "we will replace the damaged {item} at no cost.",
        "ask": [
            "The {item} arrived broken.",
            "My {item} has a hole in it.",
            "The zip of my {item} is broken.",
            "There is a tear in the {item}.",
            "The {item} came damaged.",
            "A seam of the {item} has split.",
            "My {item} is defective.",
            "The {item} fell apart after a day.",
        ],
        "held_out": ["My new {item} is damaged.", "The {item} was torn when I opened the box."],
    },
    "billing": {
        "reply": "we are checking the payment for the {item} now.",
        "ask": [
            "I need an invoice for the {item}.",
            "I was charged twice for the {item}.",
            "The invoice for my {item} is wrong.",
            "My card was declined when I paid for the {item}.",
            "Can I pay for the {item} by bank transfer?",
            "The price on the bill for the {item} is wrong.",
            "Please send the receipt for the {item}.",
            "Why was my card charged for the {item} again?",
        ],
        "held_out": ["Can you send me the invoice of my {item}?", "You charged my card twice for one {item}."],
    },
    "account": {
        "reply": "we have sent you a link to reset your password.",
        "ask": [
            "I forgot my password and want to order a {item}.",
            "I cannot log in to see my {item}.",
            "My account is locked and I need a {item}.",
            "The password reset mail does not come, and I want the {item}.",
            "How do I change my password before I buy the {item}?",
            "My login fails when I order the {item}.",
            "I cannot sign in to my account to buy the {item}.",
            "The site does not accept my password for the {item} order.",
        ],
        "held_out": ["I lost my password, how do I buy the {item}?", "Logging in to my account fails, I need a {item}."],
    },
}

ITEMS = ["jacket", "tent", "backpack", "sleeping bag", "fleece", "rain coat", "hat", "stove", "lantern", "scarf"]
HELD_OUT_ITEMS = ["water bottle", "headlamp", "sweater", "rope", "camp chair"]

# A customer in a hurry says so; nothing else makes a case urgent.
URGENT = ["This is urgent.", "It is urgent, please hurry.", "Urgent!"]
HELD_OUT_URGENT = ["Please hurry, it is urgent."]


def row(rng, category, wording, item, urgent):
    """One conversation; a question is urgent in about a third of the rows."""
    question = wording.format(item=item)
    is_urgent = rng.random() < 0.33
    if is_urgent:
        question = f"{question} {rng.choice(urgent)}"
    answer = {
        "category": category,
        "priority": "urgent" if is_urgent else "normal",
        "reply": f"Thank you, {CATEGORIES[category]['reply'].format(item=item)} {SIGN_OFF}",
    }
    messages = [
        {"role": "system", "content": "Northwind support desk."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": json.dumps(answer, separators=(",", ":"))},
    ]
    return {"messages": messages}


def training_rows(rng):
    rows = []
    for category, words in CATEGORIES.items():
        for wording in words["ask"]:
            rows += [row(rng, category, wording, item, URGENT) for item in rng.sample(ITEMS, 5)]
    rng.shuffle(rows)
    return rows


def held_out_rows(rng):
    rows = []
    for place in range(5):
        for category, words in CATEGORIES.items():
            wording = words["held_out"][place % 2]
            rows.append(row(rng, category, wording, HELD_OUT_ITEMS[place], HELD_OUT_URGENT))
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    print(f"{path.name}: {len(rows)} rows")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    rng = random.Random(20)
    write(here / "support.jsonl", training_rows(rng))
    write(here / "support_heldout.jsonl", held_out_rows(rng))

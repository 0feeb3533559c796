"""Data made from seeds: what the small models learn first, and the tasks that methods are compared on."""

import random

NAMES = ["Aroma", "Bluebird", "Cosmo", "Dune", "Ember", "Fable", "Garnet", "Harbour", "Iris", "Juniper"]
FOODS = ["noodles", "curry", "pizza", "soup", "bread", "fish"]
PRICES = ["cheap", "moderate", "high"]
AREAS = ["riverside", "centre", "north", "station"]
GOOD = ["lovely", "great", "warm", "bright", "kind"]
BAD = ["awful", "cold", "dull", "rude", "grey"]
WORDS = "stone river lamp green tall walk sing quiet seven morning paper glass wind table road".split()


def row(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def language(n, seed):
    """Sentences of all the words that the tasks use, without the tasks."""
    rng = random.Random(seed)

    def sentence():
        kind = rng.randrange(4)
        if kind == 0:
            return f"{rng.choice(NAMES)} serves {rng.choice(FOODS)} at {rng.choice(PRICES)} prices in the {rng.choice(AREAS)}."
        if kind == 1:
            return f"The {rng.choice(WORDS)} was {rng.choice(GOOD + BAD)} and {rng.choice(GOOD + BAD)}."
        return " ".join(rng.choice(WORDS + FOODS + AREAS) for _ in range(rng.randrange(3, 8)))

    return [row(sentence() + " ", sentence()) for _ in range(n)]


def attributes(n, seed):
    """Attributes to a sentence, after E2E."""
    rng = random.Random(seed)

    def one():
        name, food, price, area = (rng.choice(some) for some in (NAMES, FOODS, PRICES, AREAS))
        return row(f"name={name} food={food} price={price} area={area} -> ",
                   f"In the {area}, {name} serves {food} at {price} prices.")

    return [one() for _ in range(n)]


def sentiment(n, seed):
    """Two words of one colour, and which."""
    rng = random.Random(seed)

    def one(i):
        words, label = [(GOOD, "good"), (BAD, "bad")][i % 2]
        return row(f"The {rng.choice(WORDS)} was {rng.choice(words)} and {rng.choice(words)}. -> ", label)

    return [one(i) for i in range(n)]


TASKS = {
    "reverse": lambda words: words[::-1],
    "sort": sorted,
    "count": lambda words: [str(len(words))],
    "first": lambda words: words[:1],
    "upper": lambda words: [word.upper() for word in words],
}


def mixture(n, seed, only=None):
    """Five tasks by their tags, by turns."""
    rng = random.Random(seed)
    names = [only] if only else list(TASKS)

    def one(i):
        name = names[i % len(names)]
        words = [rng.choice(WORDS) for _ in range(rng.randrange(2, 5))]
        return row(f"{name}: {' '.join(words)} -> ", " ".join(TASKS[name](words)))

    return [one(i) for i in range(n)]

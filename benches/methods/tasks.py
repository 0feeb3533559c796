"""Data made from seeds: what the small model learns first, and the tasks that methods are compared on.

Texts are words with a space before each, and each word is one token of the model.
"""

import random

NAMES = "Aroma Bluebird Cosmo Dune Ember Fable Garnet Harbour Iris Juniper Kestrel Lotus Maple Nectar Onyx Poppy".split()
FOODS = "noodles curry pizza soup bread fish rice pasta salad cheese".split()
PRICES = "cheap moderate high".split()
AREAS = "riverside centre north station harbour park".split()
GOOD = "lovely great warm bright kind sweet fresh calm".split()
BAD = "awful cold dull rude grey sour stale loud".split()
WORDS = "stone river lamp green tall walk sing quiet seven morning paper glass wind table road cloud".split()
LABELS = "alpha beta gamma delta good bad yes no".split()
OTHERS = "name food price area in the at prices serves cooks offers sells has costs a for and The was In reverse sort count " \
         "first last upper copy 1 2 3 4 5 6 -> ; , . : =".split()
VOCABULARY = sorted({*NAMES, *FOODS, *PRICES, *AREAS, *GOOD, *BAD, *WORDS, *LABELS, *OTHERS, *(w.upper() for w in WORDS)})


def row(prompt, completion):
    return {"prompt": " " + prompt, "completion": " " + completion}


def words(rng, least=2, most=5):
    return [rng.choice(WORDS) for _ in range(rng.randrange(least, most))]


def judgement(rng, side):
    return f"The {rng.choice(WORDS)} was {rng.choice(side)} and {rng.choice(side)}"


def language(n, seed):
    """What the tasks are made of, without the tasks: sentences, repetitions, and labels to be read from examples."""
    rng = random.Random(seed)

    def sentence():
        name, food, price, area = (rng.choice(some) for some in (NAMES, FOODS, PRICES, AREAS))
        return rng.choice([
            f"{name} serves {food} in the {area} .",
            f"the {food} at {name} has {price} prices .",
            f"{name} , in the {area} , sells {food} for {price} prices .",
            f"{name} : {food} , {price} , {area} .",
        ])

    def one(i):
        if i % 4 == 0:
            return f"{sentence()} {sentence()}"
        if i % 4 == 1:
            said = rng.choice([sentence()[:-2], " ".join(words(rng, 2, 8))])
            return f"{said} ; {said} ;"
        if i % 4 == 2:
            return " ".join(f"{word} = {word.upper()} ," for word in words(rng, 3, 7))
        one, other = rng.sample(LABELS, 2)
        sides = [rng.choice([(GOOD, one), (BAD, other)]) for _ in range(9)]
        return " ; ".join(f"{judgement(rng, side)} -> {label}" for side, label in sides)

    def split(text):
        first, rest = text.split(" ", 1)
        return row(first, rest)

    return [split(one(i)) for i in range(n)]


def attributes(n, seed):
    """Attributes to a sentence, after E2E."""
    rng = random.Random(seed)

    def one():
        name, food, price, area = (rng.choice(some) for some in (NAMES, FOODS, PRICES, AREAS))
        return row(f"name = {name} food = {food} price = {price} area = {area} ->",
                   f"In the {area} , {name} cooks {food} at {price} prices .")

    return [one() for _ in range(n)]


def sentiment(n, seed):
    """Two words of one colour, and which."""
    rng = random.Random(seed)
    sides = [(GOOD, "good"), (BAD, "bad")]
    return [row(f"{judgement(rng, side)} ->", label) for side, label in (sides[i % 2] for i in range(n))]


TASKS = {
    "reverse": lambda words: words[::-1],
    "sort": sorted,
    "count": lambda words: [str(len(words))],
    "first": lambda words: words[:1],
    "upper": lambda words: [word.upper() for word in words],
}


def mixture(n, seed):
    """Five tasks by their tags, by turns."""
    rng = random.Random(seed)

    def one(i):
        name = list(TASKS)[i % len(TASKS)]
        chosen = words(rng)
        return row(f"{name} : {' '.join(chosen)} ->", " ".join(TASKS[name](chosen)) + " .")

    return [one(i) for i in range(n)]


def apart(task, n, seed, without):
    """Rows of which none is among others."""
    return [row for row in task(3 * n, seed) if row not in without][:n]

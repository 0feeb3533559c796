"""The published effects, each in small: a claim, what is trained, and a judge over the results.

Each variant has its own learning rate, the best of the same number of rates (`RATES`) by the loss on a validation part,
unless the claim is about one rate for all (`rate`).
Results are of a held-out part, by variant and seed. Where the measure is not a held-out loss, `measure` names a function
of run.py.
"""

from dataclasses import dataclass
from statistics import mean
from typing import Callable

RATES = {
    "lora": [1e-3, 3e-3, 1e-2], "moe_lora": [1e-3, 3e-3, 1e-2], "adalora": [1e-3, 3e-3, 1e-2],
    "unipelt": [1e-3, 3e-3, 1e-2], "ia3": [1e-2, 3e-2, 1e-1], "full": [1e-4, 3e-4, 1e-3],
    "prompt_tuning": [1e-2, 3e-2, 1e-1], "prefix_tuning": [1e-2, 3e-2, 1e-1], "p_tuning_v2": [1e-2, 3e-2, 1e-1],
}


@dataclass
class Effect:
    claim: str
    source: str
    task: str
    samples: int
    variants: dict
    judge: Callable
    remark: str
    steps: int = 100
    held_out: int = 100
    measure: str = "loss"
    unit: str = "held-out loss"
    rate: float | None = None

    def rates(self, variant):
        """The learning rates to choose from; with one step, only the adapter's beginning is looked at."""
        adapter = self.variants[variant]
        return [] if adapter is None or self.steps == 1 or self.rate else RATES[adapter["type"]]


def lora(r=8, **knobs):
    return {"type": "lora", "r": r, "alpha": 16, **knobs}


def below(found, one, other, by=1.0):
    """One variant's mean below another's."""
    return mean(found[one]) < by * mean(found[other])


def most(found, test):
    """In most seeds."""
    seeds = list(zip(*found.values()))
    return sum(test(dict(zip(found, values))) for values in seeds) * 2 > len(seeds)


def rank_helps(found):
    """rsLoRA's loss falls with the rank, and by more than LoRA's."""
    gain = {kind: mean(found[f"{kind} r 4"]) - mean(found[f"{kind} r 64"]) for kind in ("lora", "rslora")}
    return gain["rslora"] > max(0, gain["lora"])


RANKS = {f"{kind} r {r}": lora(r, use_rslora=kind == "rslora") for kind in ("lora", "rslora") for r in (4, 64)}

EFFECTS = {
    "lora_full": Effect(
        "with few samples, LoRA is no worse than training all weights", "LoRA, arXiv 2106.09685", "attributes", 100,
        {"lora r 8": lora(), "full": {"type": "full"}}, lambda found: below(found, "lora r 8", "full", 1.03), ""),
    "rslora": Effect(
        "at one learning rate, a higher rank helps rsLoRA more than LoRA", "rsLoRA, arXiv 2312.03732", "mixture", 400,
        RANKS, rank_helps,
        "as in the paper, one rate for all, here 0.001.", rate=1e-3),
    "rslora_tuned": Effect(
        "a higher rank helps rsLoRA more than LoRA where each has its best learning rate", "rsLoRA, arXiv 2312.03732",
        "mixture", 400, RANKS, rank_helps,
        "the paper has one rate for all; a rate of its own makes up for the scale that LoRA loses with its rank."),
    "depth": Effect(
        "prompts in every layer beat prompts at the input", "P-tuning v2, arXiv 2110.07602", "attributes", 100,
        {"prompt_tuning": {"type": "prompt_tuning", "num_virtual_tokens": 20},
         "p_tuning_v2": {"type": "p_tuning_v2", "num_virtual_tokens": 20}},
        lambda found: below(found, "p_tuning_v2", "prompt_tuning"), ""),
    "prompt_init": Effect(
        "prompts that begin as words beat those that begin at random", "prompt tuning, arXiv 2104.08691", "attributes", 100,
        {init.lower(): {"type": "prompt_tuning", "num_virtual_tokens": 20, "prompt_tuning_init": init, **more}
         for init, more in [("RANDOM", {}), ("SAMPLE_VOCAB", {}),
                            ("TEXT", {"prompt_tuning_init_text": " In the north , Iris cooks soup at high prices ."})]},
        lambda found: below(found, "sample_vocab", "random") and below(found, "text", "random"), ""),
    "ia3_shots": Effect(
        "IA3 trained on 32 examples beats the same model shown 8 of them", "T-Few, arXiv 2205.05638", "sentiment", 32,
        {"ia3": {"type": "ia3"}, "8 shots": None},
        lambda found: mean(found["ia3"]) > mean(found["8 shots"]),
        "the small base hardly reads labels from examples (chance among the two labels is 0.5, and it may say others), and the "
        "task is easy to learn: the comparison is a weak one.", measure="accuracy", unit="accuracy"),
    "adalora": Effect(
        "at a budget of rank 1, moving ranks to where they matter is no worse, and ranks end uneven",
        "AdaLoRA, arXiv 2303.10512", "mixture", 400,
        {"lora r 1": lora(1), "adalora 2 to 1": {"type": "adalora", "init_r": 2, "target_r": 1, "alpha": 16}},
        lambda found: below(found, "adalora 2 to 1", "lora r 1", 1.01),
        "the ranks of a run ended between 0 and 2, uneven over the linears.", measure="ranks"),
    "pissa": Effect(
        "what PiSSA leaves to NF4 is nearer to the weights than NF4 of the weights", "PiSSA, arXiv 2404.02948",
        "attributes", 20, {"nf4 of W": None, "A B + nf4 of the rest": lora(16, init_lora_weights="pissa")},
        lambda found: most(found, lambda one: one["A B + nf4 of the rest"] < one["nf4 of W"]),
        "rank 16 of 256; the seeds are layers 1 to 3.",
        steps=1, measure="residual", unit="relative error"),
    "unipelt": Effect(
        "with 100 samples, UniPELT is at least as good as its best part", "UniPELT, arXiv 2110.07577", "attributes", 100,
        {"lora r 8": lora(8, target_modules=["q_proj", "v_proj"]),
         "prefix": {"type": "prefix_tuning", "num_virtual_tokens": 10}, "unipelt": {"type": "unipelt"}},
        lambda found: mean(found["unipelt"]) <= 1.02 * min(mean(found["lora r 8"]), mean(found["prefix"])), ""),
    "mixlora": Effect(
        "on a mixture of tasks, experts beat LoRA of as many weights", "MixLoRA, arXiv 2404.15159", "mixture", 400,
        {"lora r 12": lora(12), "mixlora 4 x r 4": {"type": "moe_lora", "num_experts": 4, "r": 4, "alpha": 16}},
        lambda found: below(found, "mixlora 4 x r 4", "lora r 12"), ""),
    "nf4": Effect(
        "NF4 keeps more of a model than FP4", "QLoRA, arXiv 2305.14314", "language", 100,
        {"f32": lora(), "nf4": lora(), "fp4": lora()},
        lambda found: below(found, "nf4", "fp4") and most(found, lambda one: one["nf4"] < one["fp4"]),
        "one base, so that the seeds are other texts; both codes are of blocks of 64 without double quantisation.",
        steps=1, held_out=400, measure="rounded"),
}

"""The optimiser steps of `run.py` in TRL and PEFT: prints the same line.

python trl_step.py MODEL.gguf SETTINGS.json --dtype f32 --threads 2
"""

import argparse
import difflib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Clock(TrainerCallback):
    """When each step ended, and what it logged."""

    def __init__(self):
        self.times, self.logs = [], []

    def on_step_end(self, *_, **__):
        self.times.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(logs)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    settings = json.loads(args.settings.read_text())
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(args, settings, folder)))


def run(args, settings, folder):
    path = args.model.resolve()
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=DTYPES[args.dtype])
    # The file's weights are plain tensors by now, but the trainer refuses a model that says it is quantised.
    model.is_quantized, model.hf_quantizer = False, None
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    adapter = LoraConfig(r=settings["rank"], lora_alpha=16, lora_dropout=0.0, target_modules="all-linear",
                         task_type="CAUSAL_LM")
    common = {
        "output_dir": folder, "max_steps": settings["steps"], "per_device_train_batch_size": settings["batch"],
        "learning_rate": settings["rate"], "lr_scheduler_type": "constant", "optim": "adamw_torch", "weight_decay": 0.0,
        "use_cpu": True, "bf16": args.dtype == "bf16", "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 1,
    }
    clock = Clock()
    rest = {"model": model, "processing_class": tokenizer, "peft_config": adapter, "callbacks": [clock],
            "train_dataset": Dataset.from_list(settings["rows"])}
    if settings["objective"] == "dpo":
        trainer = DPOTrainer(args=DPOConfig(beta=0.1, max_length=settings["max_length"], **common), **rest)
    else:
        alike = difflib.SequenceMatcher(b=settings["reference"], autojunk=False)

        def reward(completions, **_):
            ratios = []
            for message, in completions:
                alike.set_seq1(message["content"])
                ratios.append(alike.ratio())
            return ratios

        config = GRPOConfig(num_generations=settings["batch"], max_completion_length=settings["new_tokens"],
                            temperature=1.0, beta=0.0, **common)
        trainer = GRPOTrainer(args=config, reward_funcs=reward, **rest)
    trainer.train()
    steps = [log for log in clock.logs if "loss" in log]
    found = {"step_seconds": (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)}
    # That both sides read and draw the same: the first batch under the untouched model, and how long completions are.
    for name in ("logps/chosen", "completions/mean_length"):
        if name in steps[0]:
            found[name] = statistics.mean(float(log[name]) for log in steps)
    return found


main()

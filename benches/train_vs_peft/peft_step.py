"""The same optimiser step in torch and PEFT: `train_step.rs` says what a step is, and both print the same line.

python peft_step.py MODEL.gguf --dtype f32 --batch 4 --length 128 --steps 5 --threads 2 \\
    --config '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "target_modules": "all-linear"}'
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import get_peft_config, get_peft_model
from transformers import AutoModelForCausalLM

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    model = load(args)
    ids = rows(args.batch, args.length, model.config.vocab_size)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    reset_peak()

    times, losses = [], []
    for step in range(args.steps + 1):
        begun = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        if args.config["peft_type"] == "ADALORA":
            model.base_model.update_and_allocate(step)
        optimiser.zero_grad(set_to_none=True)
        times.append((time.perf_counter() - begun) * 1000)
        losses.append(loss.item())

    counted = sorted(times[1:])
    median = counted[len(counted) // 2]
    print(json.dumps({
        "tokens_per_second": args.batch * args.length / median * 1000,
        "step_ms": median,
        "first_loss": losses[0],
        "loss": losses[-1],
        "peak_rss_mb": peak_rss_mb(),
        "threads": torch.get_num_threads(),
    }))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--config", type=json.loads, required=True, help="PEFT's, in JSON")
    parser.add_argument("--expert", type=json.loads, help="PEFT's, of what X-LoRA's adapters are")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def load(args):
    """transformers dequantises the file; the adapter stays in f32, as PEFT has it by default."""
    path = args.model.resolve()
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=DTYPES[args.dtype])
    model.config.use_cache = False
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.config["peft_type"] != "XLORA":
        return get_peft_model(model, get_peft_config(args.config)).train()
    with tempfile.TemporaryDirectory() as folder:
        experts = {}
        for name in args.config["adapters"]:
            expert = get_peft_model(model, get_peft_config(args.expert))
            expert.save_pretrained(f"{folder}/{name}")
            model = expert.unload()
            experts[name] = f"{folder}/{name}"
        config = {**args.config, "adapters": experts, "hidden_size": model.config.hidden_size}
        return get_peft_model(model, get_peft_config(config)).train()


def rows(batch, length, vocabulary):
    """The ids that train_step.rs makes."""
    state, ids = 1, []
    for _ in range(batch * length):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % vocabulary)
    return torch.tensor(ids).reshape(batch, length)


def reset_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_rss_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


main()

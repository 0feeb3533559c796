"""The GGUF's weights as a Hugging Face directory in bfloat16, for peers that take adapters only beside such."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source, target = map(Path, sys.argv[1:3])
named = {"gguf_file": source.name}
model = AutoModelForCausalLM.from_pretrained(source.resolve().parent, dtype=torch.bfloat16, **named)
# It is dense now, and may be saved.
model.hf_quantizer = None
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source.resolve().parent, **named).save_pretrained(target)
# Where readers of older configs look for it.
config = json.loads((target / "config.json").read_text())
config["rope_theta"] = config["rope_parameters"]["rope_theta"]
(target / "config.json").write_text(json.dumps(config))

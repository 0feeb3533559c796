"""transformers and PEFT behind the same few fields: requests that come together are one batch of `generate`, each row
with its own adapter (`adapter_names`)."""

import argparse
import json
import os
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

# How long a batch that is not full waits for others.
PATIENCE = 0.2


class Handler(BaseHTTPRequestHandler):
    waiting = queue.Queue()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = queue.Queue()
        self.waiting.put((asked, answer))
        content = json.dumps({"choices": [{}], "usage": {"completion_tokens": answer.get()}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--loras", nargs="*", default=[], help="PEFT directories")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = {"gguf_file": args.model.name}
    folder = str(args.model.resolve().parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype), **source)
    for i, path in enumerate(args.loras):
        if i == 0:
            model = PeftModel.from_pretrained(model, path, adapter_name="adapter-0")
        else:
            model.load_adapter(path, adapter_name=f"adapter-{i}")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while True:
        generate(model.eval(), tokenizer, batch(args.slots))


def batch(slots):
    together = [Handler.waiting.get()]
    while len(together) < slots:
        try:
            together.append(Handler.waiting.get(timeout=PATIENCE))
        except queue.Empty:
            break
    return together


@torch.inference_mode()
def generate(model, tokenizer, together):
    asked = [asked for asked, _ in together]
    rows = tokenizer([each["prompt"] for each in asked], return_tensors="pt", padding=True)
    names = [each["adapter"] or "__base__" for each in asked]
    adapters = {"adapter_names": names} if isinstance(model, PeftModel) else {}
    tokens = asked[0]["max_tokens"]
    made = model.generate(input_ids=rows.input_ids, attention_mask=rows.attention_mask, do_sample=False,
                          min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id, **adapters)
    for _, answer in together:
        answer.put(made.shape[1] - rows.input_ids.shape[1])


main()

"""mistral.rs behind the few fields of /v1/completions that the measurement sends. Requests choose adapters by name.

It refuses adapters beside a GGUF of the Llama family, so it gets the same weights dense and makes Q4_1 of them again.
Its runner takes one call at a time, and only a stream comes back from the call before it has ended: so streams it is,
of prompts as they are, without a template. Prompts of one length that it reads together fail beside quantised weights
(`input tensor is not contiguous`): each is read before the next one comes, and then all write together.
"""

import argparse
import itertools
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mistralrs import ChatCompletionRequest, LoraAdapter, Runner, Which


class Handler(BaseHTTPRequestHandler):
    runner, turn = None, threading.Lock()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            text, made = self.answer(asked)
            status, body = 200, {"choices": [{"text": text}], "usage": {"completion_tokens": made}}
        except Exception as error:
            status, body = 500, {"error": str(error)}
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer(self, asked):
        request = ChatCompletionRequest(messages=asked["prompt"], model="default", max_tokens=asked["max_tokens"],
                                        temperature=asked["temperature"], ignore_eos=asked["ignore_eos"], stream=True,
                                        adapter=asked["adapter"])
        with self.turn:
            stream = iter(self.runner.send_chat_completion_request(request))
            first = next(stream)
        text, made = "", 0
        for piece in itertools.chain([first], stream):
            text += "".join(choice.delta.content or "" for choice in piece.choices)
            made = piece.usage.completion_tokens if piece.usage else made
        return text, made

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--loras", nargs="*", default=[], help="PEFT directories")
    args = parser.parse_args()
    adapters = [LoraAdapter(f"adapter-{i}", path) for i, path in enumerate(args.loras)]
    which = Which.Lora(str(args.model), adapters=adapters, max_adapters=max(16, len(adapters)))
    Handler.runner = Runner(which, max_seqs=args.slots, prefix_cache_n=0, in_situ_quant="Q4_1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    # Its log goes there too, and nobody reads on.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    server.serve_forever()


main()

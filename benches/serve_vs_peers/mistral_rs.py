"""mistral.rs behind the few fields of /v1/completions that the measurement sends. Requests choose adapters by name.

It refuses adapters beside a GGUF of the Llama family, so it gets the same weights dense and makes Q4_1 of them again.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mistralrs import CompletionRequest, LoraAdapter, Runner, Which


class Handler(BaseHTTPRequestHandler):
    runner = None

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = CompletionRequest(prompt=asked["prompt"], model="default", max_tokens=asked["max_tokens"],
                                    temperature=asked["temperature"], ignore_eos=asked["ignore_eos"],
                                    adapter=asked["adapter"])
        try:
            answer = self.runner.send_completion_request(request)
            status, body = 200, {"choices": [{"text": answer.choices[0].text}],
                                 "usage": {"completion_tokens": answer.usage.completion_tokens}}
        except Exception as error:
            status, body = 500, {"error": str(error)}
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

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
    server.serve_forever()


main()

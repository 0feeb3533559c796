"""The servers that are measured, each a process of its own: ours, and peers behind the same three methods."""

import atexit
import json
import os
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
KEY = "bench-key-of-twenty-letters"
PATH = "/v1/completions"
BASE = "smol"
TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A process that says where it listens."""

    key = KEY

    def __init__(self, name, command, threads, **variables):
        self.name = name
        limits = {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
        self.process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.DEVNULL, env={**os.environ, **limits, **variables})
        atexit.register(self.process.kill)
        for line in self.process.stdout:
            if "listening on " in line:
                self.url = line.split("listening on ")[1].split()[0]
                return
        raise SystemExit(f"{name} did not start: {' '.join(str(part) for part in command)}")

    def body(self, prompt, tokens, adapter=None):
        """A request for so many tokens; `adapter` is a number among those that the server was given."""
        return {"model": BASE, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}

    def cpu(self):
        """Seconds of CPU so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def resident(self, kind="VmRSS"):
        """Bytes in memory."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))

    def stop(self):
        self.process.terminate()
        self.process.wait()


class Attune(Server):
    """Ours, with adapters that came by import."""

    def __init__(self, bench, folder, *options, **variables):
        command = [bench.args.binary, "serve", "--listen", "127.0.0.1:0", "--data-dir", folder, "--threads",
                   bench.args.threads, "--model", f"{BASE}={bench.model}", *options]
        super().__init__("attune", command, bench.args.threads, ATTUNE_API_KEY=KEY, **variables)
        self.adapters = []

    def body(self, prompt, tokens, adapter=None):
        body = super().body(prompt, tokens)
        return body if adapter is None else {**body, "model": self.adapters[adapter]["model"]}

    def read(self, path, body=None, kind="application/json"):
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": kind}
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{path}: {error.read().decode()}")

    def json(self, *arguments):
        return json.loads(self.read(*arguments))

    def form(self, path, content, filename, **fields):
        parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
        parts.append(f'Content-Disposition: form-data; name="file"; filename="{filename}"\r\n\r\n'.encode() + content)
        body = b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"
        return self.json(path, body, "multipart/form-data; boundary=x")

    def register(self, packed):
        """Imports an adapter's archive."""
        self.adapters.append(self.form("/v1/adapters", packed, "adapter.zip", model=BASE))
        return self.adapters[-1]

    def job(self, rows, adapter, **training):
        """Starts one; its id."""
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file = self.form("/v1/files", content, "rows.jsonl", purpose="fine-tune")["id"]
        body = {"model": BASE, "training_file": file, "adapter": adapter, "training": training}
        return self.json("/v1/fine_tuning/jobs", body)["id"]


class LlamaCpp(Server):
    """llama.cpp's own server (xllamacpp), every slot with the context that it needs."""

    def __init__(self, bench, slots, loras=(), repack=False):
        command = [bench.python, HERE / "llama_cpp.py", bench.model, "--slots", slots, "--threads", bench.args.threads]
        command += ["--loras", *loras] if loras else []
        super().__init__("llama.cpp", command + (["--repack"] if repack else []), bench.args.threads)

    def body(self, prompt, tokens, adapter=None):
        loras = [] if adapter is None else [{"id": adapter, "scale": 1.0}]
        return {**super().body(prompt, tokens), "cache_prompt": False, "lora": loras}


class MistralRs(Server):
    """mistral.rs, its Python package behind a small HTTP server."""

    def __init__(self, bench, slots, loras=()):
        command = [bench.python, HERE / "mistral_rs.py", bench.dense(), "--slots", slots]
        super().__init__("mistral.rs", command + (["--loras", *loras] if loras else []), bench.args.threads)

    def body(self, prompt, tokens, adapter=None):
        return {**super().body(prompt, tokens), "adapter": None if adapter is None else f"adapter-{adapter}"}


class TransformersPeft(Server):
    """transformers and PEFT, which answer what comes together as one batch."""

    def __init__(self, bench, slots, loras=()):
        command = [bench.args.torch, HERE / "transformers_peft.py", bench.model, "--slots", slots, "--threads",
                   bench.args.threads]
        super().__init__("transformers + PEFT", command + (["--loras", *loras] if loras else []), bench.args.threads)

    def body(self, prompt, tokens, adapter=None):
        return {**super().body(prompt, tokens), "adapter": None if adapter is None else f"adapter-{adapter}"}

"""Our server as benchmarks use it: over HTTP, as a user would. Python's own library is all that it needs."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request

KEY = "bench-key-of-twenty-letters"


class Failed(SystemExit):
    """A job that did not come to its end."""


class Server:
    """Ours, over these bases; more options as the command line takes them."""

    def __init__(self, binary, folder, bases, *options):
        command = [str(binary), "serve", "--listen", "127.0.0.1:0", "--data-dir", str(folder), *map(str, options)]
        for name, source in bases.items():
            command += ["--model", f"{name}={source}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                        env={**os.environ, "ATTUNE_API_KEY": KEY})
        for line in self.process.stdout:
            if "listening on " in line:
                self.url = line.split("listening on ")[1].split()[0]
                return
        raise SystemExit(f"the server did not start: {' '.join(command)}")

    def open(self, path, body=None, headers=None, method=None):
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **(headers or {})}
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=600)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{path}: {error.read().decode()}")

    def ask(self, *arguments, **more):
        with self.open(*arguments, **more) as answer:
            return answer.read()

    def json(self, *arguments, **more):
        return json.loads(self.ask(*arguments, **more))

    def upload(self, rows):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        body = (f'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x\r\nContent-Disposition: '
                f'form-data; name="file"; filename="rows.jsonl"\r\n\r\n{lines}\r\n--x--\r\n')
        return self.json("/v1/files", body.encode(), {"Content-Type": "multipart/form-data; boundary=x"})["id"]

    def run(self, body):
        """The finished job, the metrics of its steps, and when each of them was told."""
        job = self.json("/v1/fine_tuning/jobs", body)["id"]
        metrics, times = [], []
        with self.open(f"/v1/fine_tuning/jobs/{job}/events", headers={"Accept": "text/event-stream"}) as lines:
            for line in lines:
                event = json.loads(line[5:]) if line.startswith(b"data:") and b"{" in line else {}
                if event.get("type") == "metrics":
                    metrics.append(event["data"])
                    times.append(time.perf_counter())
        job = self.json(f"/v1/fine_tuning/jobs/{job}")
        if job["status"] != "succeeded":
            raise Failed(f"{json.dumps(body)}: {job['error']}")
        return job, metrics, times

    def stop(self):
        self.process.terminate()
        self.process.wait()

"""The API document against the tools that read it: client generators, and schemathesis on a running server.

python3 tests/openapi/check.py            (outside CI: it installs from PyPI and npm, and takes some minutes)

Fails when a generator gives up or leaves an operation out, and when schemathesis finds an answer of 5xx, or one that the
document does not describe. The server has a file, a finished job and an adapter, so that ids lead somewhere.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "target" / "openapi-check"
BIN = PLACE / "venv" / "bin"
KEY = "a-key-for-the-contract-check"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main():
    PLACE.mkdir(parents=True, exist_ok=True)
    install()
    document = PLACE / "openapi.json"
    subprocess.run(["cargo", "run", "--release", "--quiet", "--", "openapi", document], cwd=ROOT, check=True)
    generators(document)
    schemathesis()


def install():
    if not (BIN / "schemathesis").exists():
        subprocess.run([sys.executable, "-m", "venv", PLACE / "venv"], check=True)
        packages = ["schemathesis", "openapi-python-client", "ruff", "openai"]
        subprocess.run([BIN / "pip", "install", "--quiet", *packages], check=True)
    if not (PLACE / "node_modules").exists():
        packages = ["openapi-typescript", "typescript", "@hey-api/openapi-ts"]
        subprocess.run(["npm", "install", "--silent", "--prefix", PLACE, *packages], check=True)


def generators(document):
    operations = re.findall(r'"operationId": "(\w+)"', document.read_text())
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    shutil.rmtree(PLACE / "python", ignore_errors=True)
    command = ["openapi-python-client", "generate", "--path", document, "--output-path", PLACE / "python", "--fail-on-warning"]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})
    node = PLACE / "node_modules" / ".bin"
    subprocess.run([node / "openapi-typescript", document, "-o", PLACE / "types.ts"], check=True)
    subprocess.run([node / "tsc", "--noEmit", "--strict", PLACE / "types.ts"], check=True)
    subprocess.run([node / "openapi-ts", "-i", document, "-o", PLACE / "hey"], check=True)
    sdk = (PLACE / "hey" / "sdk.gen.ts").read_text()
    python = {path.stem.replace("_", "") for path in (PLACE / "python").rglob("api/**/*.py")}
    missing = [name for name in operations if name.lower() not in python or f"export const {name} " not in sdk]
    assert operations and not missing, f"operations that a generator left out: {missing}"
    print(f"{len(operations)} operations in every generated client")


def schemathesis():
    shutil.rmtree(PLACE / "data", ignore_errors=True)
    env = {**os.environ, "ATTUNE_API_KEY": KEY, "ATTUNE_DATA_DIR": str(PLACE / "data"), "ATTUNE_LISTEN": "127.0.0.1:0"}
    server = subprocess.Popen(
        ["cargo", "run", "--release", "--quiet", "--", "serve"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    try:
        address = next(line.split()[-1] for line in server.stdout if line.startswith("listening on"))
        config = PLACE / "schemathesis.toml"
        config.write_text(parameters(seed(address)))
        command = [BIN / "schemathesis", "--config-file", config, "run", f"{address}/openapi.json"]
        options = ["-H", f"Authorization: Bearer {KEY}", "--checks", CHECKS, "--max-examples", "60", "--seed", "7",
                   "--phases", "examples,coverage,fuzzing", "--request-timeout", "60"]
        subprocess.run([*command, *options], check=True)
    finally:
        server.terminate()
        server.wait(60)


def seed(address):
    """A file, a job that has ended, and the model it made."""
    from_venv = f"""
import json, time
from openai import OpenAI
client = OpenAI(base_url="{address}/v1", api_key="{KEY}")
rows = open("{ROOT}/samples/support.jsonl").readlines()[:16]
file = client.files.create(file=("rows.jsonl", "".join(rows).encode()), purpose="fine-tune")
job = client.fine_tuning.jobs.create(model="smollm2-135m-instruct", training_file=file.id, extra_body={{"training": {{"max_steps": 1}}}})
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(0.5)
    job = client.fine_tuning.jobs.retrieve(job.id)
print(json.dumps({{"file_id": file.id, "job_id": job.id, "model": job.fine_tuned_model, "status": job.status}}))
"""
    out = subprocess.run([BIN / "python", "-c", from_venv], check=True, capture_output=True, text=True).stdout
    found = json.loads(out)
    assert found.pop("status") == "succeeded", found
    request = urllib.request.Request(f"{address}/v1/adapters", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as answer:
        found["adapter_id"] = json.load(answer)["data"][0]["id"]
    return found


def parameters(ids):
    """Reads go to what is there; what deletes or steers keeps made-up ids, or the first call would take them away."""
    lines = ["[parameters]"]
    lines += [f'"path.{name}" = "{value}"' for name, value in ids.items()]
    for operation in ["DELETE /v1/files/{file_id}", "DELETE /v1/models/{model}"]:
        name = operation.split("{")[1].rstrip("}")
        lines += ["", "[[operations]]", f'include-name = "{operation}"', f'parameters = {{ "path.{name}" = "not-there" }}']
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

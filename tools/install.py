"""Install distsim and all that it needs into the virtual environment that runs this file (`make` calls it).

Says beforehand what will be downloaded, takes torch's CPU build where there is no CUDA device, pins every
version to constraints.txt, and does nothing when nothing changed since the last time. Standard library only.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = Path(sys.prefix) / ".distsim-installed"
CONSTRAINTS = ROOT / "constraints.txt"

# Sizes in MB (1e6 bytes) of the wheels pinned in constraints.txt, for Linux x86-64 and Python 3.11.
TORCH_CPU_MB, TORCH_CUDA_MB, RAY_MB, REST_MB = 192, 2730, 79, 208

NO_CPU_BUILD = f"""
pip finds no CPU build of torch where it is set to look. Taking the plain build instead, which brings CUDA
libraries that this machine cannot use: about {TORCH_CUDA_MB:,} MB to download. To avoid that, stop this (Ctrl-C),
set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index, and run the same make command again. The address is in the
pip command that the installation page of PyTorch's own site shows for Linux, Pip, CPU."""


def fingerprint() -> str:
    """Return a digest of everything that decides what is installed, and where."""
    digest = hashlib.sha256(f"{ROOT}\n{sys.prefix}\n{sys.version}\n".encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def has_cuda_device() -> bool:
    """Tell whether this machine has a CUDA device: a device file, or one that nvidia-smi lists."""
    if Path("/dev/nvidia0").exists():
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU" in answer.stdout


def pins() -> dict[str, str]:
    """Return the version of every package in constraints.txt."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS.read_text("utf-8"), re.MULTILINE))


def installed(package: str) -> str | None:
    """Return the installed version of `package`, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def pip_install(*arguments: str) -> tuple[int, str]:
    """Run `pip install`, passing its output on as it comes; return its exit status and its stderr."""
    pip_command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "install"]
    print("$ pip install", *arguments, flush=True)
    said: list[str] = []
    with subprocess.Popen(
        [*pip_command, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as pip:
        assert pip.stderr is not None
        for line in pip.stderr:
            said.append(line)
            print(line, end="", file=sys.stderr, flush=True)
    return pip.returncode, "".join(said)


def absent(versions: dict[str, str]) -> set[str]:
    """Return what is not installed in its pinned version; a local version such as `+cpu` does not matter."""
    return {name for name, version in versions.items() if (installed(name) or "").split("+")[0] != version}


def announce(cuda: bool, plain_is_cpu: bool, missing: set[str]) -> None:
    """Say what is about to be installed and about how much that downloads."""
    sizes = {"torch": TORCH_CUDA_MB if cuda else TORCH_CPU_MB, "ray": RAY_MB}
    parts = {name: mb for name, mb in sizes.items() if name in missing}
    if missing - {"torch", "ray"}:
        parts["everything else"] = REST_MB
    measured = not (cuda or plain_is_cpu)
    print(f"distsim: installing into {sys.prefix}")
    print("CUDA device: found, so torch with CUDA" if cuda else "CUDA device: none, so torch's CPU build")
    print(f"To download, less what pip has in its cache: about {sum(parts.values()):,} MB")
    for name, mb in parts.items():
        print(f"  {name:<16}{mb:>6,} MB")
    print(f"({'measured' if measured else 'an estimate'}, for Linux x86-64 and Python 3.11)", flush=True)


def install_torch(version: str, cuda: bool, plain_is_cpu: bool) -> None:
    """Install torch `version` alone: the CPU build where there is no CUDA device."""
    plain = f"torch=={version}"
    requirement = plain if cuda or plain_is_cpu else f"{plain}+cpu"
    status, said = pip_install("--no-deps", requirement)
    if status and requirement != plain and "No matching distribution found for torch" in said:
        print(NO_CPU_BUILD, flush=True)
        status, _ = pip_install("--no-deps", plain)
    if status:
        raise SystemExit(f"pip could not install torch (exit status {status}); its own message is above")


def main() -> None:
    """Install, unless the stamp says that this was done already."""
    if sys.prefix == sys.base_prefix:
        raise SystemExit("tools/install.py runs inside .venv: use `make install`")
    if STAMP.is_file() and STAMP.read_text("utf-8") == fingerprint():
        return
    STAMP.unlink(missing_ok=True)
    versions = pins()
    missing = absent({name: v for name, v in versions.items() if not name.startswith(("cuda-", "nvidia-"))})
    cuda = has_cuda_device()
    plain_is_cpu = sys.platform in ("darwin", "win32")
    announce(cuda, plain_is_cpu, missing)
    status, _ = pip_install("setuptools", "-c", CONSTRAINTS.name)
    if status:
        raise SystemExit(f"pip could not install setuptools (exit status {status}); its own message is above")
    if "torch" in missing:
        install_torch(versions["torch"], cuda, plain_is_cpu)
    # This brings what torch needs, too. The build backend is there already, so pip fetches no unpinned one.
    status, _ = pip_install("--no-build-isolation", "-e", ".[all,dev]", "-c", CONSTRAINTS.name)
    if status:
        raise SystemExit(f"pip could not install distsim (exit status {status}); its own message is above")
    STAMP.write_text(fingerprint(), "utf-8")
    print(f"distsim: installed, with torch {installed('torch')} and ray {installed('ray')}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from here") from None

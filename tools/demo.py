"""`make demo`: simulate, calibrate, train with every strategy, compare. Each command is one that users can run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trainers.calibrate import model_params

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
OUT = Path("runs") / "demo"
WORKERS, STEPS = 4, 50
TORCHRUN = f"torchrun --nproc-per-node {WORKERS} -m"


def commands(params: int) -> dict[str, list[str]]:
    """Return the commands under their headings; the simulated exchange has as many parameters as the trained one."""
    alone = f"--steps {STEPS} --no-overlap"  # exchanges with nothing beside them, as they are simulated
    return {
        "Simulate the three strategies on a shipped cluster": [
            f"distsim compare --ranks {WORKERS} --params {params} --cluster ethernet_16x10g",
        ],
        "Calibrate: a few seconds of neighbour exchanges, over TCP and over Ray": [
            f"{TORCHRUN} trainers.calibrate --out {OUT}/tcp.yaml",
            f"python -m trainers.calibrate --workers {WORKERS} --out {OUT}/ray.yaml",
        ],
        f"Train for real on {WORKERS} processes, each strategy simulated first": [
            f"{TORCHRUN} trainers --strategy ring {alone} --cluster {OUT}/tcp.yaml --out {OUT}",
            f"{TORCHRUN} trainers --strategy all-to-all {alone} --cluster {OUT}/tcp.yaml --out {OUT}",
            f"python -m trainers --strategy parameter-server --workers {WORKERS} {alone}"
            f" --cluster {OUT}/ray.yaml --out {OUT}",
        ],
        "Compare: simulated and measured": [f"python -m analysis {OUT}"],
    }


def main() -> int:
    """Run the commands in order; stop at the first that fails."""
    began = time.monotonic()
    for title, lines in commands(model_params()).items():
        print(f"\n== {title}", flush=True)
        for command in lines:
            print(f"$ {command}", flush=True)
            code = run(command)
            if code:
                print(f"demo: that command failed with exit code {code}", file=sys.stderr)
                return code
    print(f"\nthe demo took {time.monotonic() - began:.0f} s")
    return 0


def run(command: str) -> int:
    """Run one command with this environment's programs; temporary files that it leaves go with it."""
    program, *arguments = command.split()
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        environment = {**os.environ, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [str(BIN / program), *arguments], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL
        )
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()  # it has got the same signal and cleans up
            return 130


if __name__ == "__main__":
    sys.exit(main())

"""Kills a run twice with SIGKILL, gives the same command again, and ends with the same bytes as one that ran through.

A run is a folder of sealed stages: what is sealed is taken as it is, what was half written is thrown away, and the
stage goes on from its last checkpoint. So the way to go on after a crash, a preemption or Ctrl-C is to give the same
command again; the Python call does the same.

    python examples/resume_after_kill.py [OUT]
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

here = Path(__file__).parent
out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/resume")
dense = out.with_name(f"{out.name}-dense")


def command(folder: Path) -> list[str]:
    words = ["prune", str(dense), "--recipe", str(here / "tiny.yaml"), "--out", str(folder), "--until", "model"]
    return [sys.executable, "-m", "compress", *words]


def sealed(folder: Path) -> list[str]:
    found = (path.parent.relative_to(folder) for path in folder.rglob("seal.json"))
    return sorted(str(place) for place in found if place.parts[0] != ".building")


subprocess.run([sys.executable, here / "tiny.py", dense], check=True)
for stages in (1, 3):
    running = subprocess.Popen(command(out))
    while running.poll() is None and len(sealed(out)) < stages:
        time.sleep(0.01)
    running.kill()
    running.wait()
    print(f"killed; sealed until then: {', '.join(sealed(out))}", flush=True)

subprocess.run(command(out), check=True)
undisturbed = out.with_name(f"{out.name}-undisturbed")
subprocess.run(command(undisturbed), check=True)
weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (out, undisturbed)]
assert weights[0] == weights[1], "the two runs differ"
print("the same bytes as the run that was not disturbed")

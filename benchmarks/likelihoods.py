"""All estimates of the likelihood of trained runs in one table, and the guard on a solve that is too coarse; JSON.

    python benchmarks/likelihoods.py RUN... [--only NAME...] [--number 256] [--guard 32] [--drawn 256] [--out FILE]
    python benchmarks/likelihoods.py --memory [--out FILE]

For run folders of image data. ``bound`` and ``iw`` are of the SDE, ``ode_*`` of the ODE under three dequantisations
(``uniform`` with 1 and 4 draws), ``ode_exact`` with the exact trace, for few dimensions, ``ode_euler8`` is 8 Euler steps,
whose guard must trip. With --memory: the peak resident memory of an ODE likelihood of one batch of 32x32 colour images by
the networks of cifar10_small_nfdm.yaml, untrained, by number of Euler steps, each in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import build_model, report
from nfdm_lightning.cli import main as lightning
from nfdm_lightning.decoder import DiscreteDecoder
from nfdm_lightning.likelihood import ODE

ESTIMATES: dict[str, list[str]] = {
    "bound": ["--estimators=bound"],
    "iw": ["--estimators=iw", "--iw.samples=8", "--iw.steps=100"],
    "ode_decoder": ["--estimators=ode", "--ode.dequantisation=WithDecoder"],
    "ode_exact": ["--estimators=ode", "--ode.dequantisation=WithDecoder", "--ode.trace=exact"],
    "ode_truncated_normal": ["--estimators=ode", "--ode.dequantisation=TruncatedNormal"],
    "ode_uniform": ["--estimators=ode", "--ode.dequantisation=Uniform"],
    "ode_uniform_4": ["--estimators=ode", "--ode.dequantisation=Uniform", "--ode.draws=4", "--guard=0"],
    "ode_euler8": ["--estimators=ode", "--ode.dequantisation=WithDecoder", "--ode.method=euler", "--ode.steps=8"],
}
KEPT = ("bits_per_dim", "bits_per_dim_se", "nfe", "dequantisation", "trust", "seconds")


def evaluate(run: Path, only: list[str], number: int, guard: int, drawn: int, split: str) -> dict[str, Any]:
    """Returns the estimates of a run, and the gaps between the marginals of its SDE and ODE."""
    results: dict[str, Any] = {}
    for name in only:
        settings = ESTIMATES[name]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "report.json"
            samples = drawn if name == "bound" else 0
            args = [
                f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}",
                f"--number={number}",
                f"--split={split}",
                f"--out={out}",
            ]
            args += [f"--consistency.samples={samples}", f"--guard={guard}", "--progress=false", *settings]
            if lightning(["likelihood", *args]) != 0:
                raise SystemExit(f"{run}: {name} failed")
            found = json.loads(out.read_text())
        results[name] = {key: found["estimates"][0].get(key) for key in KEPT}
        if samples:
            results["marginals"] = found["marginals"]["gaps"]
    return results


def peak_memory(steps: int) -> float:
    """Returns the peak resident memory of this process in MiB after an ODE likelihood in so many steps."""
    model = build_model("cifar10_small_nfdm").eval()
    x = torch.randint(0, 256, (4, 3, 32, 32)) / 127.5 - 1
    ODE(method="euler", steps=steps).evaluate(model.reverse, DiscreteDecoder(256), x, torch.arange(4))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument(
        "--only", nargs="+", choices=tuple(ESTIMATES), default=[name for name in ESTIMATES if name != "ode_exact"]
    )
    parser.add_argument("--number", type=int, default=256)
    parser.add_argument("--guard", type=int, default=32)
    parser.add_argument("--drawn", type=int, default=256, help="samples for the comparison of SDE and ODE")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    if options.steps:
        print(peak_memory(options.steps))
        return
    if options.memory:
        peaks = {}
        for steps in (1, 4, 16, 64):
            command = [sys.executable, __file__, f"--steps={steps}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[str(steps)] = float(done.stdout.splitlines()[-1])
        report({"peak_mib_by_steps": peaks, "batch": 4, "shape": [3, 32, 32]}, options.out)
        return
    results = {}
    for run in options.runs:
        results[run.name] = evaluate(run, options.only, options.number, options.guard, options.drawn, options.split)
        print(f"done: {run.name} {json.dumps(results[run.name])}", file=sys.stderr, flush=True)
    report({"number": options.number, "split": options.split, "runs": results}, options.out)


if __name__ == "__main__":
    main()

"""What a training step of a learned forward process costs, over a Gaussian step with the same predictor; prints JSON.

    python benchmarks/step_cost.py [--data toy2d digits cifar10] [--rounds 9] [--peak] [--out FILE]

For the toy, the digits and CIFAR-10 (`cifar10_small_*`), with the predictors of the shipped configurations, and for each
forward process: as shipped, with a forward network equal to the predictor's, and with the time derivative taken in three
ways: by value and tangent in one pass (what the package does), by torch's forward mode, and by double backward. Steps are
bound, backward pass and AdamW; all ways take turns within a round, and a round's ratio is to the Gaussian step of the same
round: median and quartiles over the rounds, in CPU time. Beside it the ratio of operations in matrix products and
convolutions, counted over one step. With --peak also the peak resident memory that three steps add, each case in a process
of its own. Run on one thread (OMP_NUM_THREADS=1).
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common import build_model, report, training_step
from nfdm_lightning.processes import base
from nfdm_lightning.processes.tangents import NestedError, value_and_tangent

# configuration's prefix, batch size, the class of the predictor's network, its settings but for dropout, which costs nothing
DATA: dict[str, tuple[str, int, str, list[str]]] = {
    "toy2d": ("toy2d", 512, "ResidualMLP", ["width=128", "depth=3"]),
    "digits": ("digits", 64, "UNet", ["channels=24"]),
    "cifar10": (
        "cifar10_small",
        4,
        "UNet",
        ["channels=64", "blocks=2", "multipliers=[1,2,2,2]", "attention=[16]", "head_channels=64", "groups=32"],
    ),
}
WAYS = ("one pass", "forward mode", "double backward")


def forward_mode(function: Callable[[Tensor], Any], t: Tensor) -> tuple[Any, Any]:
    """Sends the derivative to torch's forward mode."""
    raise NestedError


def double_backward(function: Callable[[Tensor], Any], t: Tensor) -> tuple[Any, Any]:
    """Takes it by two backward passes."""
    result: tuple[Any, Any] = torch.autograd.functional.jvp(function, t, torch.ones_like(t), create_graph=True)
    return result


TAKEN = {"one pass": value_and_tangent, "forward mode": forward_mode, "double backward": double_backward}


def cases(data: str) -> dict[str, tuple[str, list[str], str]]:
    """Returns the cases by name: configuration, settings, and the way to take the derivative."""
    prefix, _, kind, network = DATA[data]
    separable = "cifar10_separable" if data == "cifar10" else f"{prefix}_separable"

    def settings(owner: str) -> list[str]:
        return [f"--model.{owner}.network={kind}", *(f"--model.{owner}.network.{setting}" for setting in network)]

    same, equal = settings("predictor"), [*settings("predictor"), *settings("process")]
    found = {"Gaussian": (f"{prefix}_gaussian", same, "one pass")}
    for name in ("NDM", "NFDM"):
        found[f"{name}, as shipped"] = (f"{prefix}_{name.lower()}", same, "one pass")
        found |= {f"{name}, equal networks, {way}": (f"{prefix}_{name.lower()}", equal, way) for way in WAYS}
    found["SeparableNFDM, equal networks"] = (separable, equal, "one pass")
    if data != "cifar10":  # whose separable configuration is of the papers' size
        found["SeparableNFDM, as shipped"] = (separable, same, "one pass")
    return found


def stepper(data: str, name: str) -> Callable[[], None]:
    """Returns a function that does one training step of a case."""
    config, settings, way = cases(data)[name]
    plain = training_step(build_model(config, *settings), DATA[data][1])

    def step() -> None:
        with mock.patch.object(base, "value_and_tangent", TAKEN[way]):
            plain()

    return step


def compare(data: str, rounds: int) -> dict[str, Any]:
    """Returns time and counted operations of a step of each case over those of a Gaussian step."""
    steps = {name: stepper(data, name) for name in cases(data)}
    counted = {}
    for name, step in steps.items():
        if "double backward" in name:  # in which torch's counter fails
            continue
        with FlopCounterMode(display=False) as counter:
            step()
        counted[name] = counter.get_total_flops()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if round_:  # the first warms up
                times[name].append(time.process_time() - begin)
    result = {}
    for name, found in times.items():
        ratios = [one / gaussian for one, gaussian in zip(found, times["Gaussian"], strict=True)]
        result[name] = {
            "ms": statistics.median(found) * 1e3,
            "over_gaussian": statistics.median(ratios),
            "quartiles": statistics.quantiles(ratios, n=4)[::2],
            "counted_operations_over_gaussian": counted[name] / counted["Gaussian"] if name in counted else None,
        }
        print(f"{data}: {name}: {result[name]}", file=sys.stderr, flush=True)
    return result


def added_memory(data: str, name: str) -> float:
    """Returns how far the resident memory of this process rises over its level before in three steps, in MiB (Linux)."""
    step = stepper(data, name)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=tuple(DATA), default=list(DATA))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", action="store_true", help="measure memory too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    if options.case:
        print(added_memory(options.data[0], options.case))
        return
    results = {}
    for data in options.data:
        results[data] = compare(data, options.rounds)
        if options.peak:
            for name, found in results[data].items():
                command = [sys.executable, __file__, "--data", data, "--case", name]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found["added_mib"] = float(done.stdout.splitlines()[-1])
    report({"rounds": options.rounds, "data": results}, options.out)


if __name__ == "__main__":
    main()

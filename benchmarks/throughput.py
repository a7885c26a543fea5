"""Images per second, memory and arithmetic of a training step on this device, eager and compiled; prints JSON.

    python benchmarks/throughput.py [--configs cifar10_gaussian cifar10_ndm cifar10_nfdm] [--batch-size 128] [--steps 30]
        [--repeats 3] [--peak-tflops 989] [--out FILE]

Whole steps: bound, backward pass, clipping, AdamW, on random images under the configuration's precision. Configurations take
turns within a repeat; the median of the repeats is reported, with the least and the greatest. Operations are counted by
torch's flop counter over one eager step (of the time derivatives too), and given as a share of ``--peak-tflops``, the
device's dense bfloat16 rate (989 for an H100 or H200). Memory is the peak over a step, less the weights, per image.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from common import build_model, report
from nfdm_lightning.module import NeuralDiffusion


def build(config: str, device: torch.device, compiled: bool) -> NeuralDiffusion:
    """Returns the model of a configuration on the device."""
    model = build_model(config).to(device)
    if compiled:
        model.reverse.predictor.network.compile()
    return model


def stepper(model: NeuralDiffusion, batch_size: int, device: torch.device) -> Callable[[], None]:
    """Returns a function that makes one training step."""
    shape = model.reverse.shape
    x = (
        torch.randint(0, model.hparams["levels"], (batch_size, *shape), device=device) * 2 / (model.hparams["levels"] - 1)
        - 1
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model.bound(x).nats.mean() / model.dimensions
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def synchronise(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measures everything and prints the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["cifar10_gaussian", "cifar10_ndm", "cifar10_nfdm"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--eager", action="store_true", help="leave out the compiled ones")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ways = [False] if chosen.eager else [False, True]
    rows: dict[str, dict[str, Any]] = {}
    steppers: dict[str, Callable[[], None]] = {}
    for config in chosen.configs:
        for compiled in ways:
            name = f"{config}, {'compiled' if compiled else 'eager'}"
            step = stepper(build(config, device, compiled), chosen.batch_size, device)
            step()  # compiles, and makes the optimiser's state
            rows[name], steppers[name] = {"seconds": []}, step
            if device.type == "cuda":
                synchronise(device)
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
                step()
                synchronise(device)
                peak = torch.cuda.max_memory_allocated(device) - before
                rows[name]["memory_per_image_mb"] = peak / chosen.batch_size / 2**20
            if not compiled:
                with FlopCounterMode(display=False) as counter:
                    step()
                flops = counter.get_total_flops()
            rows[name]["gflop_per_image"] = flops / chosen.batch_size / 1e9
    for _ in range(chosen.repeats):
        for name, step in steppers.items():
            synchronise(device)
            begin = time.perf_counter()
            for _ in range(chosen.steps):
                step()
            synchronise(device)
            rows[name]["seconds"].append((time.perf_counter() - begin) / chosen.steps)
    for row in rows.values():
        seconds = row.pop("seconds")
        row["images_per_second"] = chosen.batch_size / statistics.median(seconds)
        row["images_per_second_range"] = [chosen.batch_size / max(seconds), chosen.batch_size / min(seconds)]
        row["share_of_peak"] = row["gflop_per_image"] * row["images_per_second"] / 1e3 / chosen.peak_tflops
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    report({"device": name, "batch_size": chosen.batch_size, "rows": rows}, chosen.out)


if __name__ == "__main__":
    main()

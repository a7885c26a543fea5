"""What bfloat16 does to the bound of a trained model, by time: in the predictor alone, and in the forward process too; JSON.

    python benchmarks/precision.py CHECKPOINT... --root DATA [--images 64] [--repeats 4] [--out FILE]

For CIFAR-10 models. The same images, times and noise in float32, with autocast in the predictor alone (what training under
``bf16-mixed`` does), and with autocast in everything. ``diffusion`` is the term of the bound in bits/dim, ``excess`` what
bfloat16 adds to it on average, ``error`` its mean absolute change per sample, ``gradient`` the relative error of the
gradient of the forward process's parameters, where there are any, and of the predictor's.
"""

import argparse
import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import report
from nfdm_lightning.bound import Draws, bits_per_dim, variational_bound
from nfdm_lightning.data import CIFAR10
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.sampling import load_model

TIMES = (0.001, 0.01, 0.05, 0.2, 0.5, 0.9)
WAYS = ("float32", "predictor", "everything")


def diffusion(model: NeuralDiffusion, x: Tensor, draws: Draws, way: str) -> Tensor:
    """Returns the diffusion term in bits/dim, (B,)."""
    device = x.device.type
    with torch.autocast(device, torch.bfloat16) if way != "float32" else contextlib.nullcontext():
        bound = variational_bound(model.reverse, model.decoder, x, draws) if way == "everything" else model.bound(x, draws)
    return bits_per_dim(bound.diffusion.float(), model.dimensions)


def gradients(model: NeuralDiffusion, loss: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of both parts, each in one vector."""
    parts = {"forward": model.reverse.process, "reverse": model.reverse.predictor}
    vectors = {}
    for name, part in parts.items():
        parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]
        if parameters:
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            vectors[name] = torch.cat([one.float().flatten() for one in found if one is not None])
    return vectors


def measure(model: NeuralDiffusion, images: Tensor, repeats: int) -> dict[str, Any]:
    """Returns the table of one model: a row for each time and way."""
    rows: dict[str, Any] = {}
    for time in TIMES:
        terms: dict[str, list[Tensor]] = {way: [] for way in WAYS}
        slopes: dict[str, dict[str, Tensor]] = {}
        for seed in range(repeats):
            eps, eps_0 = torch.randn((2, *images.shape), generator=torch.Generator().manual_seed(seed)).to(images)
            draws = Draws(images.new_full((len(images),), time), eps, eps_0)
            for way in WAYS:
                term = diffusion(model, images, draws, way)
                terms[way].append(term.detach())
                if seed == 0:
                    slopes[way] = gradients(model, term.mean())
        values = {way: torch.cat(parts) for way, parts in terms.items()}
        row: dict[str, Any] = {"diffusion": values["float32"].mean().item()}
        for way in WAYS[1:]:
            change = values[way] - values["float32"]
            errors = {
                part: ((slopes[way][part] - exact).norm() / exact.norm()).item() for part, exact in slopes["float32"].items()
            }
            row[way] = {"excess": change.mean().item(), "error": change.abs().mean().item(), "gradient": errors}
        rows[f"t={time}"] = row
    return rows


def main() -> None:
    """Measures every checkpoint and prints the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--root", help="folder of the benchmarks' data")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.backends.cudnn.allow_tf32 = False  # float32 is the reference
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = CIFAR10(chosen.root, protocol="held_out").split("val")[: chosen.images].to(device)
    tables = {}
    for path in chosen.checkpoints:
        model = load_model(path).to(device)
        tables[type(model.reverse.process).__name__] = measure(model, images, chosen.repeats)
    report({"device": device, "images": len(images), "repeats": chosen.repeats, "models": tables}, chosen.out)


if __name__ == "__main__":
    main()

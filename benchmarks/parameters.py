"""Builds every shipped configuration with its real networks; prints numbers of parameters and settings as JSON.

    python benchmarks/parameters.py [--markdown] [--out FILE]

On the meta device, which holds shapes alone, but for the toys and digits; no data of a benchmark is needed.
"""

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

from common import CONFIGS, report
from nfdm_lightning.cli import NfdmCLI
from nfdm_lightning.networks import ResidualMLP, UNet
from nfdm_lightning.report import count_parameters


def build(path: Path) -> dict[str, Any]:
    """Returns a row of the table."""
    config = yaml.safe_load(path.read_text())
    toy = path.stem.startswith(("toy2d", "digits"))  # these read their data to be built
    with torch.device("cpu" if toy else "meta"):
        args = ["--config", str(path), "--trainer.accelerator=cpu", "--trainer.precision=32", "--trainer.logger=false"]
        model = NfdmCLI(args, run=False).model
    assert toy or all(parameter.is_meta for parameter in model.parameters())
    networks = [layer for layer in model.reverse.process.modules() if isinstance(layer, (UNet, ResidualMLP))]
    return {
        "shape": "x".join(map(str, model.reverse.shape)),
        "process": type(model.reverse.process).__name__,
        "process network": " + ".join(
            f"{number} {kind}" for kind, number in Counter(type(one).__name__ for one in networks).items()
        )
        or "none",
        "predictor network": type(model.reverse.predictor.network).__name__,
        **count_parameters(model),
        "batch_size": config["data"].get("init_args", {}).get("batch_size"),
        "max_steps": config["trainer"]["max_steps"],
    }


def main() -> None:
    """Builds all and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print the table as in RESULTS.md")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = {path.stem: build(path) for path in sorted(CONFIGS.glob("*.yaml"))}
    if chosen.markdown:
        lines = ["| configuration | forward, million | reverse, million | networks |", "|---|---|---|---|"]
        for name, row in rows.items():
            networks = f"{row['process network']}, {row['predictor network']}"
            lines.append(f"| `{name}` | {row['forward'] / 1e6:.2f} | {row['reverse'] / 1e6:.2f} | {networks} |")
        sys.stdout.write("\n".join(lines) + "\n")
    else:
        report({"configurations": rows}, chosen.out)


if __name__ == "__main__":
    main()

"""How often check_process is wrong: sound plug-ins that it flags, faults that it misses or does not name; prints JSON.

    python benchmarks/contract.py [--seeds 20] [--fault-seeds 5] [--shapes vector scalar image] [--plugins ...] [--out FILE]

The plug-ins and the faults are those of the tests. Every seed is another initialisation, other data and other draws.
"""

import argparse
import re
import runpy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from common import report
from nfdm_lightning.testing import Finding, findings

TESTS = Path(__file__).resolve().parent.parent / "tests"
SHAPES = {"vector": (3,), "scalar": (1,), "image": (2, 4, 4)}


def sound(faults: dict[str, Any], name: str, shape: tuple[int, ...], seeds: int) -> dict[str, Any]:
    """Returns in how many seeds a shipped plug-in is flagged, by what, and the seconds of a run."""
    flagged: dict[int, list[str]] = {}
    seconds = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        process = faults["PROCESSES"][name](shape)
        begin = time.monotonic()
        found = findings(process, faults["data"](process, seed), seed)
        seconds.append(time.monotonic() - begin)
        if found:
            flagged[seed] = [str(one) for one in found]
    return {"runs": seeds, "flagged": len(flagged), "median_seconds": statistics.median(seconds), "findings": flagged}


def faulty(faults: dict[str, Any], name: str, seeds: int) -> dict[str, Any]:
    """Returns in how many seeds a fault is caught, and named, and the most findings that it gave."""
    build, check, message, _ = faults["FAULTS"][name]
    runs: list[list[Finding]] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        process = build()
        runs.append(findings(process, faults["data"](process, seed), seed))
    named = [any(one.check == check and re.search(message, one.message) for one in found) for found in runs]
    return {
        "runs": seeds,
        "caught": sum(bool(found) for found in runs),
        "named": sum(named),
        "most_findings": max(len(found) for found in runs),
        "unnamed": {seed: [str(one) for one in runs[seed]] for seed, good in enumerate(named) if not good},
    }


def main() -> None:
    """Runs everything and prints the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--fault-seeds", type=int, default=5)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--plugins", nargs="+", help="all by default")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    chosen = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    faults = runpy.run_path(str(TESTS / "test_testing.py"))
    plugins = {
        f"{name}, {shape}": sound(faults, name, SHAPES[shape], chosen.seeds)
        for shape in chosen.shapes
        for name in chosen.plugins or faults["PROCESSES"]
    }
    caught = {name: faulty(faults, name, chosen.fault_seeds) for name in faults["FAULTS"] if chosen.fault_seeds}
    total = {
        "sound_runs": sum(one["runs"] for one in plugins.values()),
        "sound_flagged": sum(one["flagged"] for one in plugins.values()),
        "fault_runs": sum(one["runs"] for one in caught.values()),
        "fault_caught": sum(one["caught"] for one in caught.values()),
        "fault_named": sum(one["named"] for one in caught.values()),
    }
    report({"total": total, "plugins": plugins, "faults": caught}, chosen.out)


if __name__ == "__main__":
    main()

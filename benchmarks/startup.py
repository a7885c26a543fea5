"""Time to import the package and to show the command's help, over that of ``import lightning``; prints JSON.

    python benchmarks/startup.py [--rounds 7] [--out FILE]

Each in a process of its own, in turn, CPU time; medians and quartiles of the rounds' ratios.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common import report

COMMANDS = {
    "import lightning": ["-c", "import lightning"],
    "import nfdm_lightning": ["-c", "import nfdm_lightning"],
    "import nfdm_lightning.module": ["-c", "import nfdm_lightning.module"],
    "lightning --help": ["-m", "nfdm_lightning", "--help"],
    "lightning fit --help": ["-m", "nfdm_lightning", "fit", "--help"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """Returns the CPU time of a Python process with these arguments."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Runs everything and prints the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_ in range(options.rounds + 1):
        for name, arguments in COMMANDS.items():
            seconds = cpu_seconds(arguments)
            if round_:  # the first reads the files
                times[name].append(seconds)
    table = {}
    for name, found in times.items():
        ratios = [one / base for one, base in zip(found, times["import lightning"], strict=True)]
        table[name] = {
            "seconds": statistics.median(found),
            "over_import_lightning": statistics.median(ratios),
            "quartiles": statistics.quantiles(ratios, n=4)[::2],
        }
    report({"rounds": options.rounds, "commands": table}, options.out)


if __name__ == "__main__":
    main()

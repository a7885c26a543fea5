"""Test bits/dim of every plug-in on the digits: equal reverse network, equal steps, several seeds; prints JSON.

python benchmarks/plugins_on_digits.py [--seeds 3] [--steps 1500] [--plugins ndm ...] [--out FILE]
"""

import tempfile
import time
from pathlib import Path

from common import compare, options, report, train_and_test


def main() -> None:
    """Runs everything and prints the table as JSON."""
    chosen = options(__doc__ or "", steps=1500)
    with tempfile.TemporaryDirectory() as scratch:

        def run(plugin: str, seed: int) -> dict[str, float]:
            begin = time.monotonic()
            folder = Path(scratch) / f"{plugin}_{seed}"
            model, results = train_and_test(f"digits_{plugin}", seed, chosen.steps, folder)
            parameters = {
                "process_parameters": sum(p.numel() for p in model.reverse.process.parameters()),
                "predictor_parameters": sum(p.numel() for p in model.reverse.predictor.parameters()),
            }
            return {**results, **parameters, "seconds": round(time.monotonic() - begin, 1)}

        report({"steps": chosen.steps, "plugins": compare(run, chosen.plugins, chosen.seeds)}, chosen.out)


if __name__ == "__main__":
    main()

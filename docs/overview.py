"""Makes the picture of the README from two runs: python docs/overview.py RUN_OF_TOY2D RUN_OF_DIGITS.

Takes ``pictures/trajectories_test.png`` of the first and ``samples/samples.png`` of the second.
"""

import sys
from pathlib import Path

from PIL import Image


def main(toy: str, digits: str) -> None:
    """Sets the two pictures side by side, on white, at one height."""
    left = Image.open(Path(toy) / "pictures" / "trajectories_test.png")
    right = Image.open(Path(digits) / "samples" / "samples.png")
    margin = 20
    side = left.height - 2 * margin
    right = right.resize((side * right.width // right.height, side), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (left.width + right.width + 2 * margin, left.height), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + margin, margin))
    sheet.save(Path(__file__).parent / "images" / "overview.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

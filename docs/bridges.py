"""Makes docs/images/bridges.png of the README from what ``benchmarks/bridges.py --pictures FOLDER`` has drawn.

python docs/bridges.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    """Sets the pictures side by side, at one height."""
    folder = Path(sys.argv[1])
    names = ("obstacle_without_sde", "obstacle_with_sde", "digits_bridge_sde")
    height = 540
    parts = []
    for name in names:
        picture = Image.open(folder / f"{name}.png").convert("RGB")
        if name.startswith("digits"):  # pixels, enlarged without smoothing
            factor = max(1, 380 // picture.height)
            picture = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
        canvas = Image.new("RGB", (picture.width + 20, height), "white")
        canvas.paste(picture, (10, (height - picture.height) // 2))
        parts.append(np.asarray(canvas))
    out = Path(__file__).parent / "images" / "bridges.png"
    Image.fromarray(np.concatenate(parts, 1)).save(out, optimize=True)
    sys.stdout.write(f"{out}\n")


if __name__ == "__main__":
    main()

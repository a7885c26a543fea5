"""Makes the picture of bridges in the README: python docs/bridges.py FOLDER.

Takes what ``benchmarks/bridges.py --pictures FOLDER`` has drawn.
"""

import sys
from pathlib import Path

from PIL import Image, ImageChops


def main(folder: str) -> None:
    """Sets the pictures side by side, on white, without their margins."""
    parts = []
    for name in ("obstacle_without_sde", "obstacle_with_sde", "digits_bridge_sde"):
        picture = Image.open(Path(folder) / f"{name}.png").convert("RGB")
        box = ImageChops.difference(picture, Image.new("RGB", picture.size, "white")).getbbox()
        parts.append(picture.crop(box))
    height = max(part.height for part in parts[:2])
    digits = parts[2]
    parts[2] = digits.resize((height * digits.width // digits.height, height), Image.Resampling.NEAREST)
    margin = 15
    sheet = Image.new("RGB", (sum(part.width + margin for part in parts) + margin, height + 2 * margin), "white")
    left = margin
    for part in parts:
        sheet.paste(part, (left, margin + (height - part.height) // 2))
        left += part.width + margin
    sheet.save(Path(__file__).parent / "images" / "bridges.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

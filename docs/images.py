"""Makes the picture of image samples in the README: python docs/images.py RUNS.

Takes the samples that ``benchmarks/plugins_on_images.py mnist --folder RUNS`` has drawn after its tests.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

TITLES = {"gaussian": "Gaussian", "ndm": "NDM", "nfdm": "NFDM"}


def main(folder: str) -> None:
    """Sets the three grids side by side, each under the name of its plug-in."""
    figure, axes = plt.subplots(1, 3, figsize=(10.2, 3.8), layout="constrained")
    for axis, (plugin, title) in zip(axes, TITLES.items(), strict=True):
        axis.imshow(Image.open(Path(folder) / f"mnist_{plugin}" / "pictures" / "samples_test.png"), cmap="gray")
        axis.set_title(title, fontsize=13)
        axis.set_axis_off()
    figure.savefig(Path(__file__).parent / "images" / "mnist.png", dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Tiny random stand-ins for the benchmarks, in the formats in which these lie on disk; read with ``verify=false``."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def _random(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def _write_idx(folder: Path, packed: bool) -> None:
    folder.mkdir(parents=True)
    for part, number in (("train", 240), ("t10k", 20)):
        labels = (np.arange(number) % 10).astype(np.uint8)
        for name, array in (("images-idx3-ubyte", _random((number, 28, 28))), ("labels-idx1-ubyte", labels)):
            content = idx_bytes(array)
            path = folder / f"{part}-{name}{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)


def write_mnist(root: Path) -> None:
    _write_idx(root / "mnist", packed=False)


def write_fashion_mnist(root: Path) -> None:
    _write_idx(root / "fashion_mnist", packed=True)


def write_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        records = _random((80, 3073))
        records[:, 0] = np.arange(80) % 10
        if name != "test_batch.bin":
            records[:, 1] = int(name[11])  # the red of the first pixel says which batch
            records[:, 2] = np.arange(80)  # and the next one which image
        (folder / name).write_bytes(records.tobytes())


def _write_imagenet(root: Path, size: int) -> None:
    for version in ("pixelrnn", "downsampled"):
        folder = root / f"imagenet{size}_{version}"
        folder.mkdir(parents=True)
        for name, number in (("train", 60), ("val", 12)):
            np.save(folder / f"{name}.npy", _random((number, 3, size, size)))
            if version == "downsampled":
                np.save(folder / f"{name}_labels.npy", np.arange(number))
        (folder / "origin.json").write_text(json.dumps({"version": version}))


def write_imagenet32(root: Path) -> None:
    _write_imagenet(root, 32)


def write_imagenet64(root: Path) -> None:
    _write_imagenet(root, 64)


def write_images(folder: Path, number: int, size: int, first: int = 0) -> None:
    """Images of one colour each, which resizing leaves alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        colour = (first + i, 2 * i, 255 - i)
        Image.new("RGB", (size, size), colour).save(folder / f"{i:06d}.png")


def write_celeba_hq(root: Path) -> None:
    write_images(root / "celeba_hq", 40, 256)


def write_afhq(root: Path) -> None:
    for name, test in (("afhq", "val"), ("afhq_v2", "test")):
        for number, member in enumerate(("cat", "dog", "wild")):
            write_images(root / name / "train" / member, 24, 64, 50 * number)
            write_images(root / name / test / member, 4, 64, 50 * number + 30)


STANDINS: dict[str, Callable[[Path], None]] = {
    "MNIST": write_mnist,
    "FashionMNIST": write_fashion_mnist,
    "CIFAR10": write_cifar10,
    "ImageNet32": write_imagenet32,
    "ImageNet64": write_imagenet64,
    "CelebAHQ": write_celeba_hq,
    "AFHQ": write_afhq,
}
"""By the name of the DataModule."""


def write_standin(name: str, root: Path) -> None:
    """Writes the stand-in of a benchmark below a root folder, which need not exist."""
    STANDINS[name](Path(root))

"""MNIST and Fashion-MNIST, in their idx files."""

import gzip
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from nfdm_lightning.data.benchmark import Benchmark, Split
from nfdm_lightning.data.storage import check_md5, download, md5_of
from nfdm_lightning.errors import DataError

_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
_FILES = (f"train-{_IMAGES}", f"train-{_LABELS}", f"t10k-{_IMAGES}", f"t10k-{_LABELS}")


class IdxImages(Benchmark):
    """28x28 grey images in the four files of MNIST, raw or ``.gz``: the last 5,000 of the 60,000 training images are for
    validation, the 10,000 test images for test.

    The files lie in the benchmark's folder below the root, or where torchvision puts them; missing ones are downloaded.

    Args:
        root: folder of all benchmarks; None for the environment variable NFDM_DATA, or else ``data``.
        verify: whether the files must be the published ones; false for data of one's own in the same format.
        classes: names or numbers of the classes that are kept; None keeps all.
        batch_size: samples per step and process.
        eval_batch_size: samples per step and process in validation, test and prediction.
        num_workers: loader processes.
        seed: of the order of the training data; the splits are fixed.
        flip: whether training images are mirrored left to right at random.
        labels: whether batches carry the class of each sample, for a conditional model.

    Raises:
        DataError: files that are missing and cannot be downloaded, damaged, or of another format.
    """

    folders: ClassVar[tuple[str, str]]
    """Below the root: our own, and torchvision's."""
    address: ClassVar[str]
    md5: ClassVar[dict[str, str]]

    def __init__(
        self,
        root: str | None = None,
        verify: bool = True,
        classes: list[str | int] | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        flip: bool = False,
        labels: bool = False,
    ) -> None:
        super().__init__(root, verify, classes, batch_size, eval_batch_size, num_workers, seed, flip, labels)

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 28, 28)

    def _found(self, name: str) -> Path | None:
        candidates = [self.root / folder / file for folder in self.folders for file in (name, f"{name}.gz")]
        return next((path for path in candidates if path.is_file()), None)

    def _path(self, name: str) -> Path:
        return self._found(name) or self.root / self.folders[0] / f"{name}.gz"

    def prepare_data(self) -> None:
        for name in _FILES:
            if self._found(name) is None:
                download([f"{self.address}{name}.gz"], self._path(name), self.md5[f"{name}.gz"])

    def _read(self, name: str, dimensions: int) -> Tensor:
        path = self._path(name)
        if self.verify:
            check_md5(path, self.md5[path.name])
        return read_idx(path, dimensions)

    def read(self) -> dict[str, Split]:
        parts = {}
        for part in ("train", "t10k"):
            images, labels = self._read(f"{part}-{_IMAGES}", 3), self._read(f"{part}-{_LABELS}", 1).long()
            path = self._path(f"{part}-{_IMAGES}")
            if images.shape[1:] != (28, 28):
                raise DataError(f"{path} has images of {images.shape[1]}x{images.shape[2]} pixels, not 28x28")
            if len(images) != len(labels) or labels.max() >= len(self.class_names):
                raise DataError(f"{path} has {len(images)} images, but {len(labels)} labels up to {int(labels.max())}")
            parts[part] = images[:, None], labels
        images, labels = parts["train"]
        held = max(len(images) // 12, 1)
        return {
            "train": self.keep(images[:-held], labels[:-held]),
            "val": self.keep(images[-held:], labels[-held:]),
            "test": self.keep(*parts["t10k"]),
        }

    def content(self) -> list[str]:
        return [md5_of(self._path(name)) for name in _FILES]


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Returns the bytes of an idx file, raw or ``.gz``, as a tensor of that many dimensions.

    Raises:
        DataError: the file is something else, or not whole.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): delete it and start again") from None
    if content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(
            f"{path} is no idx file of bytes in {dimensions} dimensions: it begins with {content[:4].hex() or 'nothing'}, "
            f"not 000008{dimensions:02x}; delete it and start again"
        )
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(f"{path} ends inside its header: delete it and start again")
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    size = int(np.prod(shape, dtype=object))
    if not size or len(content) != header + size:
        raise DataError(
            f"{path} should hold {' x '.join(map(str, shape))} bytes, but has {len(content) - header}: delete it and start "
            "again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


class MNIST(IdxImages):
    """MNIST: handwritten digits. Splits, arguments and errors are those of :class:`IdxImages`."""

    folders = ("mnist", "MNIST/raw")
    address = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    class_names = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    }

    @property
    def data_std(self) -> float:
        return 0.616  # measured on the training images


class FashionMNIST(IdxImages):
    """Fashion-MNIST: articles of clothing. Splits, arguments and errors are those of :class:`IdxImages`."""

    folders = ("fashion_mnist", "FashionMNIST/raw")
    address = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
    class_names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }

    @property
    def data_std(self) -> float:
        return 0.706  # from the usual figures of the training images: twice 0.353, for pixels in [0, 1]

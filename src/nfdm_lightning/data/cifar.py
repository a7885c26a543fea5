"""CIFAR-10, in its binary files."""

import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nfdm_lightning.data.benchmark import Benchmark, Split
from nfdm_lightning.data.storage import check_md5, download, md5_of, partial_file
from nfdm_lightning.errors import ConfigError, DataError

Protocol = Literal["official", "full", "held_out"]
_FOLDER = "cifar-10-batches-bin"
_ARCHIVE = "cifar-10-binary.tar.gz"
_ADDRESS = f"https://www.cs.toronto.edu/~kriz/{_ARCHIVE}"
_ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
_TEST = "test_batch.bin"
_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    _TEST: "803d5f7f4d78ea53de84dbe85f74fb6d",
}
_RECORD = 1 + 3 * 32 * 32


class CIFAR10(Benchmark):
    """CIFAR-10, 32x32 in colour, from ``cifar-10-batches-bin/`` below the root; if files are missing, they are unpacked from
    ``cifar-10-binary.tar.gz`` beside it, or that is downloaded.

    5,000 of the 50,000 training images are held out, the last of a fixed random order, and used by one of these protocols:

    * ``official``: train on the other 45,000, validate on those held out, test on the 10,000 test images;
    * ``full``: train on all 50,000, as the tables of most papers; validation then sees images that are trained on;
    * ``held_out``: train on 45,000, validate and test on those held out; needs no test file.

    Args:
        root: folder of all benchmarks; None for the environment variable NFDM_DATA, or else ``data``.
        protocol: official, full or held_out.
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

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(
        self,
        root: str | None = None,
        protocol: Protocol = "official",
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
        if protocol not in get_args(Protocol):
            raise ConfigError(f"data.protocol={protocol}: there are {', '.join(get_args(Protocol))}")
        self.protocol = protocol

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, 32, 32)

    @property
    def data_std(self) -> float:
        return 0.503  # measured on the training images

    def _paths(self) -> list[Path]:
        names = [name for name in _MD5 if name != _TEST or self.protocol != "held_out"]
        return [self.root / _FOLDER / name for name in names]

    def prepare_data(self) -> None:
        missing = [path for path in self._paths() if not path.is_file()]
        if not missing:
            return
        archive = self.root / _ARCHIVE
        if not archive.is_file():
            only_test = [path.name for path in missing] == [_TEST]
            otherwise = "; data.protocol=held_out needs no test file" if only_test else ""
            download([_ADDRESS], archive, _ARCHIVE_MD5, otherwise)
        elif self.verify:
            check_md5(archive, _ARCHIVE_MD5)
        _unpack(archive, missing)  # the archive stays: another machine may be reading it

    def read(self) -> dict[str, Split]:
        parts = [self._read(path) for path in self._paths()]
        test = parts.pop() if self.protocol != "held_out" else None
        images, labels = (torch.cat([part[i] for part in parts]) for i in range(2))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held = max(len(images) // 10, 1)
        train, val = order[:-held], order[-held:]
        if self.protocol == "full":
            train = order
        kept = {name: self.keep(images[places], labels[places]) for name, places in (("train", train), ("val", val))}
        return {**kept, "test": kept["val"] if test is None else self.keep(*test)}

    def _read(self, path: Path) -> tuple[Tensor, Tensor]:
        if self.verify:
            check_md5(path, _MD5[path.name])
        content = np.fromfile(path, np.uint8)
        if not len(content) or len(content) % _RECORD:
            raise DataError(f"{path} has {len(content)} bytes, no multiple of {_RECORD}: delete it and start again")
        records = torch.from_numpy(content).view(-1, _RECORD)
        labels = records[:, 0].long()
        if labels.max() >= len(self.class_names):
            raise DataError(f"{path} has a label {int(labels.max())}, not 0 to 9: it is no CIFAR-10 batch")
        return records[:, 1:].reshape(-1, 3, 32, 32), labels

    def content(self) -> list[str]:
        return [self.protocol, *(md5_of(path) for path in self._paths())]

    def record(self) -> dict[str, Any]:
        validation = "training images" if self.protocol == "full" else "held out of the training images"
        test = "the validation images" if self.protocol == "held_out" else "official test images"
        return {**super().record(), "protocol": self.protocol, "validation": validation, "test": test}


def _unpack(archive: Path, paths: list[Path]) -> None:
    try:
        with tarfile.open(archive) as tar:
            for path in paths:
                source = tar.extractfile(f"{_FOLDER}/{path.name}")
                if source is None:
                    raise KeyError(path.name)
                with source, partial_file(path) as file:
                    shutil.copyfileobj(source, file)
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{archive} cannot be unpacked ({error}): delete it and start again") from None

"""What the benchmarks of images share: a root folder, a choice of classes, labels, and a record of what was read."""

import abc
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nfdm_lightning.data.base import DataModule
from nfdm_lightning.data.storage import data_root
from nfdm_lightning.errors import ConfigError, DataError


class Split(NamedTuple):
    """Images (N, C, H, W), uint8, and their classes (N,), int64, if they have any."""

    images: Tensor
    labels: Tensor | None


def chosen_classes(classes: Sequence[str | int] | None, names: Sequence[str]) -> list[int] | None:
    """Returns the numbers of classes that are given by name or number, in order; None for all.

    Raises:
        ConfigError: an unknown class, or none.
    """
    if classes is None:
        return None
    lower = [name.lower() for name in names]
    numbers = set()
    for wanted in classes:
        if str(wanted).lower() in lower:
            numbers.add(lower.index(str(wanted).lower()))
        elif str(wanted).isdecimal() and int(wanted) < len(names):
            numbers.add(int(wanted))
        else:
            raise ConfigError(f"data.classes: no class {wanted!r}; there are {', '.join(names)}, or 0 to {len(names) - 1}")
    if not numbers:
        raise ConfigError(f"data.classes is empty: name some of {', '.join(names)}, or null for all")
    return sorted(numbers)


class Benchmark(DataModule):
    """Base of the benchmarks: a subclass brings its files into place in :meth:`prepare_data`, which must cost nothing when
    they are, and gives the splits in :meth:`read`.

    Args:
        root: folder of all benchmarks; None for the environment variable NFDM_DATA, or else ``data``.
        verify: whether the files must be the published ones; false for data of one's own in the same format.
        classes: names or numbers of the classes that are kept; None keeps all.
        batch_size: samples per step and process.
        eval_batch_size: samples per step and process in validation, test and prediction.
        num_workers: loader processes.
        seed: of the order of the training data; the splits are fixed.
        flip: whether training images are mirrored left to right at random.
        labels: whether batches carry the class of each sample, for a conditional model; if some classes alone are kept,
            these are numbered anew in their order.
    """

    class_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        root: str | None,
        verify: bool,
        classes: list[str | int] | None,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        seed: int,
        flip: bool,
        labels: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, flip, labels)
        self.root, self.verify = data_root(root), verify
        self.kept = chosen_classes(classes, self.class_names)

    @property
    def levels(self) -> int:
        return 256

    @property
    def data_std(self) -> float:
        """Standard deviation per dimension after normalisation: the usual estimate for natural images, unless measured."""
        return 0.5

    @abc.abstractmethod
    def prepare_data(self) -> None:
        """Brings the files into place: downloads, unpacks or converts what is missing."""

    @abc.abstractmethod
    def read(self) -> dict[str, Split]:
        """Returns the splits ``train``, ``val`` and ``test`` with the kept classes."""

    @abc.abstractmethod
    def content(self) -> list[str]:
        """Returns checksums of what is read and the choices that decide the splits."""

    def arrays(self) -> dict[str, Tensor]:
        self.prepare_data()
        splits = self.read()
        for name, split in splits.items():
            if not len(split.images):
                raise DataError(f"{type(self).__name__}: the {name} split holds no images of the classes {self._classes()}")
        self._labels = {name: split.labels for name, split in splits.items()}
        return {name: split.images for name, split in splits.items()}

    def labels(self, split: str) -> Tensor | None:
        self.setup()
        return self._labels[split]

    @property
    def class_count(self) -> int | None:
        return len(self.class_names if self.kept is None else self.kept) or None

    def model_labels(self, split: str) -> Tensor:
        labels = super().model_labels(split)
        return labels if self.kept is None else torch.searchsorted(torch.tensor(self.kept), labels)

    def keep(self, images: Tensor, labels: Tensor) -> Split:
        """Returns what is of the kept classes."""
        if self.kept is None:
            return Split(images, labels)
        places = torch.isin(labels, torch.tensor(self.kept)).nonzero()[:, 0]
        return Split(images[places], labels[places])

    def _classes(self) -> list[str] | None:
        return None if self.kept is None else [self.class_names[number] for number in self.kept]

    @cached_property
    def checksum(self) -> str:
        self.setup()
        parts = json.dumps([type(self).__name__, self.version, self._classes(), *self.content()])
        return hashlib.md5(parts.encode(), usedforsecurity=False).hexdigest()

    def record(self) -> dict[str, Any]:
        return {**super().record(), "classes": self._classes(), "verified": self.verify}

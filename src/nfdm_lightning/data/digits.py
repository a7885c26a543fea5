"""The handwritten digits that ship inside scikit-learn: real data without a download."""

from typing import Any

import torch
from torch import Tensor

from nfdm_lightning.data.base import DataModule
from nfdm_lightning.errors import ConfigError


class Digits(DataModule):
    """1,797 digits of 8x8 pixels and 17 grey levels, split once and for all: 1,297 train, 200 validation, 300 test.

    Args:
        digit: keep one class, 0 to 9, as one end of a bridge; None keeps all.
        batch_size: samples per step and process.
        eval_batch_size: samples per step and process in validation, test and prediction.
        num_workers: loader processes.
        seed: of the order of the training data; the split is fixed.
        labels: whether batches carry the class of each sample, for a conditional model.
    """

    def __init__(
        self,
        digit: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 300,
        num_workers: int = 0,
        seed: int = 0,
        labels: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, labels=labels)
        if digit is not None and not 0 <= digit <= 9:
            raise ConfigError(f"digit={digit} must be 0 to 9, or null for all")
        self.digit = digit

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 8, 8)

    @property
    def levels(self) -> int:
        return 17

    @property
    def data_std(self) -> float:
        return 0.75

    @property
    def class_count(self) -> int:
        return 10 if self.digit is None else 1

    def model_labels(self, split: str) -> Tensor:
        return super().model_labels(split) - (self.digit or 0)

    def arrays(self) -> dict[str, Tensor]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = torch.from_numpy(digits.images).to(torch.uint8)[:, None], torch.from_numpy(digits.target)
        # the file is in the order of its writers: mix them, so that the splits are alike
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        splits = {"train": order[500:], "val": order[:200], "test": order[200:500]}
        if self.digit is not None:
            splits = {name: places[labels[places] == self.digit] for name, places in splits.items()}
        self._labels = {name: labels[places].long() for name, places in splits.items()}
        return {name: images[places] for name, places in splits.items()}

    def labels(self, split: str) -> Tensor | None:
        self.setup()
        return self._labels[split]

    def record(self) -> dict[str, Any]:
        return {**super().record(), "classes": None if self.digit is None else [str(self.digit)]}

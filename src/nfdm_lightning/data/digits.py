"""The handwritten digits that ship inside scikit-learn: real data without a download."""

import torch
from torch import Tensor

from nfdm_lightning.data.base import DataModule


class Digits(DataModule):
    """1,797 digits of 8x8 pixels and 17 grey levels, split once and for all: 1,297 train, 200 validation, 300 test.

    Args:
        batch_size: samples per step and process.
        eval_batch_size: samples per step and process in validation, test and prediction.
        num_workers: loader processes.
        seed: of the order of the training data; the split is fixed.
    """

    def __init__(self, batch_size: int = 128, eval_batch_size: int = 300, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 8, 8)

    @property
    def levels(self) -> int:
        return 17

    @property
    def data_std(self) -> float:
        return 0.75

    def arrays(self) -> dict[str, Tensor]:
        from sklearn.datasets import load_digits

        images = torch.from_numpy(load_digits().images).to(torch.uint8)[:, None]
        # the file is in the order of its writers: mix them, so that the splits are alike
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        return {"train": images[500:], "val": images[:200], "test": images[200:500]}

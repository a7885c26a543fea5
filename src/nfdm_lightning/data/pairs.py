"""Pairs of data and source for bridges, made of any two DataModules."""

import hashlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nfdm_lightning.data.base import SPLITS, ArrayDataset, DataModule, Samples
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.seeding import mixed_seed

_PARTNERS = 0x9A126  # begins the seeds of fixed partners


class _Unpaired(Samples):
    """Targets, each with any of S sources: variant j + S v has the source at distance j, and v numbers the mirrorings.

    A fresh variant per epoch means that no model can learn a pairing by heart.
    """

    def __init__(self, targets: ArrayDataset, sources: ArrayDataset) -> None:
        self.targets, self.sources = targets, sources

    @property
    def variants(self) -> int:
        return len(self.sources) * self.targets.variants * self.sources.variants

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, samples: Tensor, variants: Tensor) -> Tensor:
        partners = (samples + variants % len(self.sources)) % len(self.sources)
        mirrorings = variants // len(self.sources)
        targets = self.targets.fetch(samples, mirrorings % self.targets.variants)
        return torch.stack([targets, self.sources.fetch(partners, mirrorings // self.targets.variants)], 1)


class Pairs(DataModule):
    """Pairs (target, source) of two data sets, (B, 2, *event): a bridge runs from the source to the target.

    Unpaired, every target meets a fresh random source in each epoch, and a fixed one in validation and test. Paired, sample
    i of the one belongs to sample i of the other. Levels and scale are those of the target. Each part that has ``flip`` set
    is mirrored at random, on its own if unpaired; paired parts are mirrored together.

    Args:
        target: what is to be generated.
        source: where the bridge starts.
        paired: whether equal places belong together.
        batch_size: pairs per step and process; those of the two parts are ignored.
        eval_batch_size: pairs per step and process in validation, test and prediction.
        num_workers: loader processes.
        seed: of the order and of the random pairs.

    Raises:
        ConfigError: the two differ in shape, or, where they are paired, in size or in ``flip``, or one has ``labels``.
    """

    def __init__(
        self,
        target: DataModule,
        source: DataModule,
        paired: bool = False,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, target.flip or source.flip)
        if target.shape != source.shape:
            raise ConfigError(
                f"Pairs: the target has shape {target.shape}, the source {source.shape}; a bridge needs equal ones"
            )
        if target.with_labels or source.with_labels:
            raise ConfigError("Pairs: a bridge takes no labels: set labels of target and source to false")
        if paired and target.flip != source.flip:
            raise ConfigError("Pairs: paired samples are mirrored together: set flip of both parts, or of neither")
        self.target, self.source, self.paired = target, source, paired

    @property
    def shape(self) -> tuple[int, ...]:
        return self.target.shape

    @property
    def levels(self) -> int | None:
        return self.target.levels

    @property
    def data_std(self) -> float:
        return self.target.data_std

    def prepare_data(self) -> None:
        self.target.prepare_data()
        self.source.prepare_data()

    def _parts(self, split: str) -> tuple[Tensor, Tensor]:
        targets, sources = self.target.raw(split), self.source.raw(split)
        if targets.dtype != sources.dtype:  # levels on one side alone
            targets, sources = self.target.normalise(targets), self.source.normalise(sources)
        if self.paired and len(targets) != len(sources):
            raise ConfigError(
                f"Pairs: paired, but {len(targets)} targets and {len(sources)} sources in the {split} split: set paired "
                "to false, or give both the same number"
            )
        return targets, sources

    def _fixed(self, split: str) -> Tensor:
        targets, sources = self._parts(split)
        if not self.paired:
            seed = mixed_seed(_PARTNERS, self.seed, SPLITS.index(split))
            order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(seed))
            sources = sources[order[torch.arange(len(targets)) % len(sources)]]
        return torch.stack([targets, sources], 1)

    def arrays(self) -> dict[str, Tensor]:
        # unpaired training pairs are made batch by batch: a fixed copy of them would double the memory for nothing
        return {name: self._fixed(name) for name in SPLITS if self.paired or name != "train"}

    def raw(self, name: str) -> Tensor:
        return self._fixed(name) if name == "train" and not self.paired else super().raw(name)

    def train_dataset(self) -> Samples:
        if self.paired:
            return super().train_dataset()
        targets, sources = self._parts("train")
        return _Unpaired(ArrayDataset(targets, self.target.flip), ArrayDataset(sources, self.source.flip))

    def labels(self, split: str) -> Tensor | None:
        return self.target.labels(split)

    @cached_property
    def checksum(self) -> str:
        parts = f"{self.target.checksum} {self.source.checksum} {self.paired} {self.seed}"
        return hashlib.md5(parts.encode(), usedforsecurity=False).hexdigest()

    def sizes(self) -> dict[str, int]:
        return self.target.sizes()

    def record(self) -> dict[str, Any]:
        parts = {"target": self.target.record(), "source": self.source.record()}
        return {**super().record(), "paired": self.paired, **parts}

    def normalise(self, batch: Tensor) -> Tensor:
        if batch.is_floating_point():
            return batch
        return torch.stack([self.target.normalise(batch[:, 0]), self.source.normalise(batch[:, 1])], 1)

    def sources(self, number: int, split: str = "test") -> Tensor:
        return self.source.sources(number, split)

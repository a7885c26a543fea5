"""Pairs of data and source for bridges, made of any two DataModules."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nfdm_lightning.data.base import DataModule, EpochSampler
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.seeding import mixed_seed

_SPLITS = ("train", "val", "test")
_PARTNERS = 0x9A125  # begins the seeds of partners, so that they share no stream with the noise of training


class _UnpairedDataset(Dataset[Tensor]):
    """All combinations of a target and a source: number i + N j is target i of N with source i + j."""

    def __init__(self, targets: Tensor, sources: Tensor) -> None:
        self.targets, self.sources = targets, sources

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        number = torch.as_tensor(indices)
        target, turn = number % len(self), number // len(self)
        return torch.stack([self.targets[target], self.sources[(target + turn) % len(self.sources)]], 1)


class _PartnerSampler(EpochSampler):
    """Every target once per epoch, with a partner drawn by (seed, epoch, rank): no model can learn a pairing by heart."""

    def __iter__(self) -> Iterator[int]:
        targets = torch.tensor(self.indices())
        assert isinstance(self.dataset, _UnpairedDataset)
        generator = torch.Generator().manual_seed(mixed_seed(_PARTNERS, self.seed, self.epoch, self.rank))
        partners = torch.randint(len(self.dataset.sources), (len(targets),), generator=generator)
        yield from (targets + len(self.dataset) * partners)[self.begin :].tolist()


class Pairs(DataModule):
    """Pairs (target, source) of two data sets, (B, 2, *event): a bridge runs from the source to the target.

    Unpaired, every target meets a fresh random source in each epoch, and a fixed one in validation and test. Paired, sample
    i of the one belongs to sample i of the other. Levels and scale are those of the target.

    Args:
        target: what is to be generated.
        source: where the bridge starts.
        paired: whether equal places belong together.
        batch_size: pairs per step and process; those of the two parts are ignored.
        eval_batch_size: pairs per step and process in validation, test and prediction.
        num_workers: loader processes.
        seed: of the order and of the random pairs.

    Raises:
        ConfigError: the two differ in shape, or, where they are paired, in size.
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
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        if target.shape != source.shape:
            raise ConfigError(
                f"Pairs: the target has shape {target.shape}, the source {source.shape}; a bridge needs equal ones"
            )
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
            seed = mixed_seed(_PARTNERS, self.seed, _SPLITS.index(split))
            order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(seed))
            sources = sources[order[torch.arange(len(targets)) % len(sources)]]
        return torch.stack([targets, sources], 1)

    def arrays(self) -> dict[str, Tensor]:
        # unpaired training pairs are made batch by batch: a fixed copy of them would double the memory for nothing
        return {name: self._fixed(name) for name in _SPLITS if self.paired or name != "train"}

    def raw(self, name: str) -> Tensor:
        return self._fixed(name) if name == "train" and not self.paired else super().raw(name)

    def train_dataset(self) -> Dataset[Tensor]:
        return super().train_dataset() if self.paired else _UnpairedDataset(*self._parts("train"))

    def train_sampler(self, data: Dataset[Tensor], **settings: Any) -> EpochSampler:
        return (EpochSampler if self.paired else _PartnerSampler)(data, **settings)

    def normalise(self, batch: Tensor) -> Tensor:
        if batch.is_floating_point():
            return batch
        return torch.stack([self.target.normalise(batch[:, 0]), self.source.normalise(batch[:, 1])], 1)

    def sources(self, number: int, split: str = "test") -> Tensor:
        return self.source.sources(number, split)

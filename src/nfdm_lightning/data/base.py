"""What every DataModule shares: shape, levels and scale for the model, resumable loaders, normalisation on the device."""

import abc
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from nfdm_lightning.checksums import tensors_md5
from nfdm_lightning.errors import ConfigError, DataError
from nfdm_lightning.labels import Batch, Labelled, unpack
from nfdm_lightning.seeding import mixed_seed

SPLITS = ("train", "val", "test")
_VARIANTS = 0x9A125  # begins the seeds of variants, so that they share no stream with the noise of training


class Samples(Dataset[Batch], abc.ABC):
    """Samples that come in :attr:`variants`, such as mirrored: number i + N v is variant v of sample i of N."""

    @property
    def variants(self) -> int:
        """Number of variants of each sample, all equally likely in training; variant 0 is the sample itself."""
        return 1

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def fetch(self, samples: Tensor, variants: Tensor) -> Batch:
        """Returns the given variants (B,) of the given samples (B,), (B, *event), with their labels if there are any."""

    def __getitem__(self, number: int) -> Batch:
        batch, labels = unpack(self.__getitems__([number]))
        return batch[0] if labels is None else Labelled(batch[0], labels[0])

    def __getitems__(self, numbers: list[int]) -> Batch:
        places = torch.as_tensor(numbers)
        return self.fetch(places % len(self), places // len(self))


def to_levels(samples: Tensor, levels: int) -> Tensor:
    """Maps samples in [-1, 1] back to levels 0 .. L-1, uint8: the inverse of :meth:`DataModule.normalise`."""
    return ((samples + 1) * (levels - 1) / 2).round().clamp(0, levels - 1).to(torch.uint8)


class ArrayDataset(Samples):
    """Samples in one tensor, (N, *event); a whole batch is fetched by one indexing.

    Args:
        array: the samples.
        flip: whether images, (N, ..., C, H, W), have a second variant, mirrored left to right.

    Raises:
        ConfigError: ``flip`` for samples that are no images.
    """

    def __init__(self, array: Tensor, flip: bool = False) -> None:
        if flip and array.ndim < 4:
            raise ConfigError(
                f"flip=true mirrors images, but the samples have shape {tuple(array.shape[1:])}: set flip=false"
            )
        self.array, self.flip = array, flip

    @property
    def variants(self) -> int:
        return 2 if self.flip else 1

    def __len__(self) -> int:
        return len(self.array)

    def fetch(self, samples: Tensor, variants: Tensor) -> Tensor:
        batch, mirrored = self.array[samples], variants == 1
        if mirrored.any():
            batch[mirrored] = batch[mirrored].flip(-1)
        return batch


class _LabelledSamples(Samples):
    """Samples with their labels, (N,)."""

    def __init__(self, samples: Samples, labels: Tensor) -> None:
        self.samples, self.labels = samples, labels

    @property
    def variants(self) -> int:
        return self.samples.variants

    def __len__(self) -> int:
        return len(self.samples)

    def fetch(self, samples: Tensor, variants: Tensor) -> Labelled:
        return Labelled(unpack(self.samples.fetch(samples, variants))[0], self.labels[samples])


class EpochSampler(DistributedSampler[Any]):
    """Shuffles by (seed, epoch), draws the variant of each place by (seed, epoch, rank), and starts at a given place."""

    begin = 0

    def __init__(self, dataset: Samples, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        self.samples = dataset

    def numbers(self) -> Tensor:
        """Returns the whole epoch of this rank, as numbers of samples in their variants."""
        places = torch.tensor(list(super().__iter__()))
        if self.samples.variants == 1:
            return places
        generator = torch.Generator().manual_seed(mixed_seed(_VARIANTS, self.seed, self.epoch, self.rank))
        variants = torch.randint(self.samples.variants, (len(places),), generator=generator)
        return places + len(self.samples) * variants

    def __iter__(self) -> Iterator[int]:
        yield from self.numbers()[self.begin :].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Ignores the trainer's epoch, set after the iterator exists: the loader keeps its own."""

    def seek(self, epoch: int, begin: int) -> None:
        """Goes to a place in an epoch."""
        self.epoch, self.begin = epoch, begin


class _PartSampler(DistributedSampler[Any]):
    """This rank's part of a data set in order, rank, rank + R, rank + 2R, ...: every sample exactly once over all ranks.

    Torch's own repeats samples to make the ranks equal, which counts them twice; and any other class of sampler the trainer
    would take to pieces once more.
    """

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


class ResumableLoader(DataLoader[Batch]):
    """A shuffling DataLoader whose order depends on (seed, epoch) alone and that continues inside an epoch.

    The trainer stores ``state_dict()`` in its checkpoints, so a resumed run sees the batches that the stopped one did not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch, self._batch = 0, 0
        self._used = False  # whether the present iterator has handed out a batch

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch of the data and the number of batches handed out in it."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues after the given batch of the given epoch."""
        self._epoch, self._batch = state["epoch"], state["batch"]
        if self._batch >= len(self):
            self._epoch, self._batch = self._epoch + 1, 0
        self._used = False

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self._used:  # the trainer may make an iterator twice before it takes a batch: that is no new epoch
            self._epoch, self._batch, self._used = self._epoch + 1, 0, False
        assert self.batch_size is not None
        if isinstance(self.sampler, EpochSampler):  # overfit_batches puts another in its place
            self.sampler.seek(self._epoch, self._batch * self.batch_size)
        iterator = super().__iter__()

        def batches() -> Iterator[Batch]:
            for batch in iterator:
                self._batch, self._used = self._batch + 1, True
                yield batch

        return batches()


def _whole(batch: Any) -> Any:
    return batch  # the data set hands out whole batches


class DataModule(LightningDataModule, abc.ABC):
    """Base of the DataModules: a subclass says what the data is, :attr:`shape`, :attr:`levels`, :attr:`data_std` and
    :meth:`arrays`.

    A batch is one tensor: of levels, (B, *event), for data of discrete levels, normalised to [-1, 1] on the device, or of
    floats, as they are. With ``labels`` it is a :class:`~nfdm_lightning.labels.Labelled`: that tensor and the classes, (B,).

    Args:
        batch_size: samples per step and process.
        eval_batch_size: samples per step and process in validation, test and prediction.
        num_workers: loader processes; 0 is fastest for data in memory.
        seed: of the order of the data.
        flip: whether training images are mirrored left to right at random, by (seed, epoch, process, place).
        labels: whether batches carry the class of each sample, for a conditional model; the data must define
            :meth:`labels` and :attr:`class_count`.
    """

    version: str | None = None
    """Which of several data sets of the same name this is."""

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        flip: bool = False,
        labels: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} and eval_batch_size={eval_batch_size} must be at least 1")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.seed, self.flip, self.with_labels = num_workers, seed, flip, labels

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Event shape of a sample: (D,) or (C, H, W)."""

    @property
    def levels(self) -> int | None:
        """Number of equally spaced levels of discrete data; None for continuous data."""
        return None

    @property
    def data_std(self) -> float:
        """Standard deviation per dimension after normalisation, for the predictor's preconditioning."""
        return 1.0

    @property
    def class_count(self) -> int | None:
        """Number of classes of the data, whether or not batches carry them; None where there are none."""
        return None

    @property
    def num_classes(self) -> int | None:
        """Number of classes of a conditional model of the data; None unless batches carry labels."""
        if not self.with_labels:
            return None
        if self.class_count is None:
            raise ConfigError(f"data.labels=true: {type(self).__name__} has no labels: set it to false, or take other data")
        return self.class_count

    @abc.abstractmethod
    def arrays(self) -> dict[str, Tensor]:
        """Returns the splits ``train``, ``val`` and ``test``, each (N, *event), uint8 levels or float32."""

    def normalise(self, batch: Tensor) -> Tensor:
        """Maps levels 0 .. L-1 to [-1, 1]; leaves floats alone."""
        if self.levels is None:
            return batch
        return batch.to(torch.get_default_dtype()) * (2 / (self.levels - 1)) - 1

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalises on the device."""
        samples, labels = unpack(batch)
        return self.normalise(samples) if labels is None else Labelled(self.normalise(samples), labels)

    def setup(self, stage: str | None = None) -> None:
        """Reads the splits once."""
        if not hasattr(self, "_splits"):
            self._splits = self.arrays()

    def raw(self, name: str) -> Tensor:
        """Returns a split as it is kept, (N, *event): levels or floats."""
        self.setup()
        return self._splits[name]

    def split(self, name: str) -> Tensor:
        """Returns a split as normalised floats, (N, *event)."""
        return self.normalise(self.raw(name))

    def sources(self, number: int, split: str = "test") -> Tensor:
        """Returns samples for a bridge to start from, (number, *event): the first of a split, repeated if it is short."""
        samples = self.raw(split)
        return self.normalise(samples[torch.arange(number) % len(samples)])

    def labels(self, split: str) -> Tensor | None:
        """Returns the classes of a split, (N,) int64, in the order of :meth:`raw`; None where there are none."""
        return None

    def model_labels(self, split: str) -> Tensor:
        """Returns the labels of a split as batches carry them, (N,) int64: of K classes, 0 .. K - 1.

        Raises:
            ConfigError: the data have no labels.
        """
        classes, labels = self.num_classes, self.labels(split)
        if classes is None or labels is None:
            raise ConfigError(f"{type(self).__name__}: the {split} split comes without labels; set data.labels=false")
        return labels.long()

    def _with_labels(self, samples: Samples, split: str) -> Samples:
        classes = self.num_classes
        if classes is None:
            return samples
        labels = self.model_labels(split)
        if len(labels) != len(samples) or not bool(((labels >= 0) & (labels < classes)).all()):
            raise DataError(
                f"{type(self).__name__}: the {len(samples)} samples of the {split} split have {len(labels)} labels from "
                f"{int(labels.min())} to {int(labels.max())}; one label for each was expected, below {classes}"
            )
        return _LabelledSamples(samples, labels)

    @cached_property
    def checksum(self) -> str:
        """What the splits hold, as a key for what is computed from them; flips and the order of batches do not count."""
        return tensors_md5({name: self.raw(name) for name in SPLITS})

    def sizes(self) -> dict[str, int]:
        """Returns the number of samples of each split."""
        return {name: len(self.raw(name)) for name in SPLITS}

    def record(self) -> dict[str, Any]:
        """Returns what the data are, in plain JSON values, for reports."""
        return {
            "class": type(self).__name__,
            "version": self.version,
            "shape": list(self.shape),
            "levels": self.levels,
            "sizes": self.sizes(),
            "classes": None,
            "flip": self.flip,
            "labels": self.with_labels,
            "checksum": self.checksum,
        }

    def train_dataset(self) -> Samples:
        """Returns the training samples, with their mirror images if ``flip`` is set."""
        return ArrayDataset(self.raw("train"), self.flip)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def train_dataloader(self) -> ResumableLoader:
        """Returns the shuffled training batches of this rank; the last, incomplete batch is left out."""
        data, (replicas, rank) = self._with_labels(self.train_dataset(), "train"), self._ranks()
        sampler = EpochSampler(data, num_replicas=replicas, rank=rank, shuffle=True, seed=self.seed, drop_last=True)
        if len(sampler) < self.batch_size:
            raise ConfigError(
                f"data.batch_size={self.batch_size} is more than the {len(sampler)} training samples of a process: "
                "give a smaller --data.batch_size"
            )
        loader = ResumableLoader(
            data,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=True,
            collate_fn=_whole,
            num_workers=self.num_workers,
        )
        if self.trainer is not None:  # a loader made anew in a later epoch must not repeat the first
            loader.load_state_dict({"epoch": self.trainer.current_epoch, "batch": 0})
        return loader

    def _eval_dataloader(self, split: str) -> DataLoader[Batch]:
        array, (replicas, rank) = self.raw(split), self._ranks()
        if len(array) < replicas:
            raise ConfigError(f"the {split} split has {len(array)} samples, fewer than the {replicas} processes")
        data = self._with_labels(ArrayDataset(array), split)
        return DataLoader(
            data,
            batch_size=self.eval_batch_size,
            sampler=_PartSampler(data, num_replicas=replicas, rank=rank, shuffle=False),
            collate_fn=_whole,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns this rank's part of the validation split, in order."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Returns this rank's part of the test split, in order."""
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Returns this rank's part of the test split, in order."""
        return self._eval_dataloader("test")

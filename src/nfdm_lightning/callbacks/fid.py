r"""Frechet distance, kernel distance and inception score of samples, with the protocol that each number belongs to.

.. math:: |\mu - \mu_r|^2 + \operatorname{tr}\big(\Sigma + \Sigma_r - 2 (\Sigma \Sigma_r)^{1/2}\big)

between Gaussians with the moments of the features of samples and of a reference split (arXiv 1706.08500). It falls with the
number of samples even where the distributions are the same: numbers compare at equal number, reference and features alone.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.utilities.distributed import gather_all_tensors

from nfdm_lightning.callbacks.ema import EMA
from nfdm_lightning.callbacks.training_record import holds_average
from nfdm_lightning.checksums import tensors_md5
from nfdm_lightning.data import DataModule, to_levels
from nfdm_lightning.data.base import SPLITS
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.features import FeatureExtractor, Inception
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.provenance import settings_of
from nfdm_lightning.seeding import mixed_seed
from nfdm_lightning.solvers import Ancestral, Solver

CACHE = "NFDM_CACHE"
"""The environment variable that names the folder of cached reference statistics."""

_FORMAT = "1"  # of the cached files; a change of how images become features needs another
_SAMPLES = 0xF1D  # begins the seeds of samples, so that they share no stream with other draws
_KID_SUBSETS, _KID_SUBSET_SIZE, _SCORE_SPLITS = 100, 1000, 10  # those of torch-fidelity


class _Identity(nn.Module):
    """For torchmetrics: the features have been extracted, once for all the metrics."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@dataclass(frozen=True)
class _Statistics:
    """What is kept of a set of images, on the CPU: moments in float64, features and logits in the order of the images."""

    count: Tensor
    total: Tensor
    outer: Tensor
    features: Tensor
    logits: Tensor


class FID(Callback):
    """Measures samples of each of several solvers against a split of the data, at the end of a test and, if asked for, of a
    validation.

    Logs ``{val,test}/fid@Ancestral100`` and the like; a distance between features other than Inception's has another name
    (:class:`~nfdm_lightning.features.FeatureExtractor`). :attr:`results` holds the numbers with their whole protocol.

    Sample i draws its numbers from (seed, i) alone, so that batch size and number of processes change nothing but rounding,
    except for Adaptive and TorchSDE, which treat a batch as a whole. The weights are those of all validation and testing:
    the averaged ones under EMA. A conditional model is sampled with labels of the reference split, spread over it, each as
    often as there. Does nothing in a ``fast_dev_run``.

    Args:
        features: between which features; by default those of Inception.
        solvers: how to sample, each in turn: an FID for each number of function evaluations; the SDE in 100 by default.
        number: samples of each solver, over all processes.
        split: reference, ``train``, ``val`` or ``test``.
        every_n_epochs: epochs between measurements at validation; None measures in the test alone.
        batch_size: samples drawn at a time by a process.
        seed: of the noise.
        kid: whether to measure the kernel distance (KID) too: 100 subsets of 1000, mean and standard deviation.
        inception_score: whether to measure the inception score too: 10 parts, mean and standard deviation.
        cache: folder of the reference statistics; by default that of NFDM_CACHE, or ``~/.cache/nfdm_lightning``.
        guidance: weight of classifier-free guidance, for a conditional model.

    Raises:
        ConfigError: a setting is out of range, the weights of the extractor are missing, or the data are no images.
    """

    def __init__(
        self,
        features: FeatureExtractor | None = None,
        solvers: list[Solver] | None = None,
        number: int = 50_000,
        split: str = "train",
        every_n_epochs: int | None = None,
        batch_size: int = 256,
        seed: int = 0,
        kid: bool = False,
        inception_score: bool = False,
        cache: str | None = None,
        guidance: float = 1.0,
    ) -> None:
        if number < 2 or batch_size < 1:
            raise ConfigError(f"FID: number={number} must be at least 2 and batch_size={batch_size} at least 1")
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ConfigError(f"FID: every_n_epochs={every_n_epochs} must be at least 1, or null for the test alone")
        if split not in SPLITS:
            raise ConfigError(f"FID: split={split!r}: choose from {', '.join(SPLITS)}")
        if solvers is not None and not solvers:
            raise ConfigError("FID: solvers is an empty list: name at least one, or leave it out")
        self.features = features or Inception()
        if inception_score and self.features.num_logits is None:
            raise ConfigError(f"FID: inception_score=true needs class logits, and {self.features.name} has none")
        named = _named(solvers or [Ancestral(nfe=100)])
        self.solvers = named if guidance == 1 else {f"{name}_guidance{guidance:g}": one for name, one in named.items()}
        self.guidance = guidance
        self.number, self.split, self.every_n_epochs = number, split, every_n_epochs
        self.batch_size, self.seed, self.kid, self.inception_score = batch_size, seed, kid, inception_score
        default = os.environ.get(CACHE) or Path.home() / ".cache" / "nfdm_lightning"
        self.cache = Path(cache or default) / "references"
        self.results: list[dict[str, Any]] = []
        """The numbers of the latest measurement, each with its protocol, in plain JSON values."""
        self._loaded_average: bool | None = None  # whether the weights of the loaded checkpoint are an average
        self._held: tuple[str, _Statistics | None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded_average = None
        if stage == "test" or (stage in ("fit", "validate") and self.every_n_epochs is not None):
            _images_of(trainer)
            self.features.eval().prepare()  # a missing file ends a run here, not after its first epoch

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_average = holds_average(checkpoint)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.every_n_epochs is None:
            return
        if trainer.state.fn == TrainerFn.VALIDATING or (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure(trainer, pl_module, "test")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._held = None

    def _measure(self, trainer: Trainer, model: LightningModule, stage: str) -> None:
        assert isinstance(model, NeuralDiffusion), "the FID callback measures a NeuralDiffusion"
        if getattr(trainer, "fast_dev_run", False):
            return
        data = _images_of(trainer)
        # modules that move inside the trainer's inference mode could not be used outside it any more
        with torch.inference_mode(False), torch.no_grad():
            self.features.to(model.device)
            try:
                reference = self._reference(trainer, model, data)
                source = stage if model.reverse.process.takes_source else None
                sources = None if source is None else data.sources(self.number, source)
                labels = self._labels(model, data)
                self.results = []
                for name, solver in self.solvers.items():
                    rank_zero_info(f"{self.features.label}: {self.number} samples of {name}")
                    self.results += self._results(trainer, model, data, name, solver, reference, sources, labels)
            finally:
                self.features.cpu()  # its memory on the device is for the training that goes on
        for result in self.results:
            result["source_split"] = source
        logged = {f"{stage}/{result['metric']}@{result['sampler']}": result["value"] for result in self.results}
        # measured on one process and handed to all: every rank logs the same numbers
        model.log_dict(logged, rank_zero_only=False)

    def _results(
        self,
        trainer: Trainer,
        model: NeuralDiffusion,
        data: DataModule,
        name: str,
        solver: Solver,
        reference: _Statistics | None,
        sources: Tensor | None,
        labels: Tensor | None,
    ) -> list[dict[str, Any]]:
        """Returns the numbers of one solver, on every process."""
        assert data.levels is not None
        tally = _Tally()
        batches = self._sample(trainer, model, solver, sources, labels, data.levels, tally)
        samples = self._statistics(trainer, model, batches, self.kid, self.inception_score)
        sums = torch.tensor([tally.evaluations, tally.broken], device=model.device)
        evaluations, broken = (int(value) for value in trainer.strategy.reduce(sums, reduce_op="sum"))
        values: list[dict[str, Any]] = []
        if trainer.is_global_zero:
            assert reference is not None
            device = _double_device(model.device)
            values.append({"metric": self.features.label, "value": _frechet(reference, samples)})
            if self.kid:
                values.append({"metric": self.features.kernel_label, **_kernel(reference, samples, self.seed, device)})
            if self.inception_score:
                values.append({"metric": self.features.score_label, **_score(samples, self.seed, device)})
        values = trainer.strategy.broadcast(values)
        if broken:
            rank_zero_warn(f"{broken} of {self.number} samples of {name} are not finite: there is no distance to them")
            values = [{**value, "value": math.nan} for value in values]
        protocol = {
            "sampler": name,
            "solver": {"class": type(solver).__name__, **settings_of(solver)},
            "nfe": evaluations / self.number,
            "labels": None if labels is None else f"of the {self.split} split",
            "guidance": self.guidance,
            "number": self.number,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "precision": str(model.dtype).removeprefix("torch."),
            "ema": self._averaged(trainer),
            "reference_split": self.split,
            "reference_size": len(data.raw(self.split)),
            "data": type(data).__name__,
            "data_checksum": data.checksum,
            **self.features.identity(),
        }
        return [{**value, **protocol} for value in values]

    def _sample(
        self,
        trainer: Trainer,
        model: NeuralDiffusion,
        solver: Solver,
        sources: Tensor | None,
        labels: Tensor | None,
        levels: int,
        tally: "_Tally",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Draws this process's samples: their places among all, and their pixels."""
        for places in self._batches(trainer, self.number):
            generators = [torch.Generator().manual_seed(mixed_seed(_SAMPLES, self.seed, i)) for i in places]
            source, label = (None if given is None else given[list(places)] for given in (sources, labels))
            x, solution = model.sample(len(places), solver, generators, source=source, label=label, guidance=self.guidance)
            tally.evaluations += solution.nfe * len(places)
            tally.broken += int((~solution.z.isfinite()).flatten(1).any(1).sum())
            yield torch.tensor(places), _pixels(x, levels)

    def _labels(self, model: NeuralDiffusion, data: DataModule) -> Tensor | None:
        """Returns the labels of the samples of a conditional model, (number,): those of the split, evenly spread over it."""
        if model.num_classes is None:
            return None
        labels = data.model_labels(self.split)
        return labels[torch.arange(self.number) * len(labels) // self.number]

    def _batches(self, trainer: Trainer, number: int) -> Iterator[range]:
        own = range(trainer.global_rank, number, trainer.world_size)
        for begin in range(0, len(own), self.batch_size):
            yield own[begin : begin + self.batch_size]

    def _reference(self, trainer: Trainer, model: NeuralDiffusion, data: DataModule) -> _Statistics | None:
        """Returns the statistics of the reference split; None on the processes that need none."""
        size = len(data.raw(self.split))
        kept = min(size, self.number) if self.kid else 0
        key = json.dumps(
            {
                "format": _FORMAT,
                "data": data.checksum,
                "levels": data.levels,
                "split": self.split,
                "kept": kept,
                **self.features.identity(),
            },
            sort_keys=True,
        )
        if self._held is not None and self._held[0] == key:
            return self._held[1]
        digest = hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()
        path = self.cache / f"{self.features.name}_{self.split}_{digest}.safetensors"
        found = _read(path, key) if trainer.is_global_zero else None
        if not trainer.strategy.broadcast(found is not None):
            rank_zero_info(f"{self.features.label}: statistics of the {size} samples of the {self.split} split")
            batches = self._images(trainer, model, data, size)
            # spread over the split, which may be sorted by class
            chosen = torch.arange(kept) * size // max(kept, 1)
            found = self._statistics(trainer, model, batches, self.kid, False, chosen)
            if trainer.is_global_zero:
                _write(path, key, found)
        self._held = (key, found)
        return found

    def _images(
        self, trainer: Trainer, model: NeuralDiffusion, data: DataModule, size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this process's part of the reference split: places, and pixels."""
        raw, levels = data.raw(self.split), data.levels
        assert levels is not None
        for places in self._batches(trainer, size):
            index = torch.tensor(places)
            batch = data.normalise(raw[index].to(model.device))
            yield index, _pixels(model.target(batch), levels)

    def _statistics(
        self,
        trainer: Trainer,
        model: NeuralDiffusion,
        batches: Iterator[tuple[Tensor, Tensor]],
        with_features: bool,
        with_logits: bool,
        chosen: Tensor | None = None,
    ) -> _Statistics:
        """Passes images through the extractor once and returns what the metrics need of them, over all processes.

        Args:
            trainer: knows the processes.
            model: knows the device.
            batches: places and pixels of this process's images.
            with_features: whether to keep the features.
            with_logits: whether to keep the logits.
            chosen: the places whose features are kept; None keeps all.
        """
        width, classes = self.features.num_features, self.features.num_logits or 0
        device = _double_device(model.device)
        metric = FrechetInceptionDistance(_Identity(width), sync_on_compute=False).to(device)
        features, logits = [torch.empty(0, width)], [torch.empty(0, classes)]
        feature_places, logit_places = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)]
        for places, pixels in batches:
            values, scores = self.features(pixels.to(model.device))
            metric.update(values.to(device).double(), real=False)
            if with_features:
                mine = torch.ones(len(places), dtype=torch.bool) if chosen is None else torch.isin(places, chosen)
                features.append(values.cpu().float()[mine])
                feature_places.append(places[mine])
            if with_logits:
                assert scores is not None
                logits.append(scores.cpu().float())
                logit_places.append(places)
        metric.sync()  # sums over the processes
        return _Statistics(
            metric.fake_features_num_samples.cpu(),
            metric.fake_features_sum.cpu(),
            metric.fake_features_cov_sum.cpu(),
            _gathered(trainer, model.device, feature_places, features),
            _gathered(trainer, model.device, logit_places, logits),
        )

    def _averaged(self, trainer: Trainer) -> bool:
        if trainer.state.fn != TrainerFn.FITTING and self._loaded_average is not None:
            return self._loaded_average
        averages = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
        return any(average.decay > 0 for average in averages)


@dataclass
class _Tally:
    """Of the samples of one process: evaluations of the predictor, and samples that are not finite."""

    evaluations: int = 0
    broken: int = 0


def _images_of(trainer: Trainer) -> DataModule:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, DataModule):
        raise ConfigError("FID compares with the data: run the trainer with a DataModule of this package")
    if data.levels is None or data.levels > 256 or len(data.shape) != 3 or data.shape[0] not in (1, 3):
        kind = "continuous values" if data.levels is None else f"{data.levels} levels"
        raise ConfigError(
            f"FID is for images of 1 or 3 channels and at most 256 levels, but {type(data).__name__} has samples of shape "
            f"{tuple(data.shape)} and {kind}: remove the callback"
        )
    return data


def _pixels(x: Tensor, levels: int) -> Tensor:
    """Maps images in [-1, 1] of L levels to levels 0 .. 255, uint8."""
    return (to_levels(x, levels).double() * 255 / (levels - 1)).round().to(torch.uint8)


def _named(solvers: list[Solver]) -> dict[str, Solver]:
    """Returns the solvers by name: class and nfe, and where these are the same, the settings that differ."""
    names = [f"{type(solver).__name__}{settings_of(solver).get('nfe', '')}" for solver in solvers]
    named: dict[str, Solver] = {}
    for name, solver in zip(names, solvers, strict=True):
        alike = [settings_of(other) for other_name, other in zip(names, solvers, strict=True) if other_name == name]
        unlike = {k: v for k, v in settings_of(solver).items() if any(settings.get(k) != v for settings in alike)}
        full = name + "".join(f"_{k}{v}" for k, v in unlike.items())
        if full in named:
            raise ConfigError(f"FID: solvers names {full} twice: remove one")
        named[full] = solver
    return named


def _double_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # float64 is unknown to it


def _gathered(trainer: Trainer, device: torch.device, places: list[Tensor], rows: list[Tensor]) -> Tensor:
    """Returns the rows of all processes in the order of their places, on the CPU."""
    index, values = torch.cat(places), torch.cat(rows)
    if trainer.world_size > 1:
        index = torch.cat(gather_all_tensors(index.to(device))).cpu()
        values = torch.cat(gather_all_tensors(values.to(device))).cpu()
    return values[index.argsort()]


def _frechet(reference: _Statistics, samples: _Statistics) -> float:
    width = len(reference.total)
    metric = FrechetInceptionDistance(_Identity(width), sync_on_compute=False)
    metric.update(torch.empty(0, width, dtype=torch.float64), real=False)  # it takes its precision from here
    metric.real_features_num_samples, metric.fake_features_num_samples = reference.count, samples.count
    metric.real_features_sum, metric.fake_features_sum = reference.total, samples.total
    metric.real_features_cov_sum, metric.fake_features_cov_sum = reference.outer, samples.outer
    return float(metric.compute())


def _kernel(reference: _Statistics, samples: _Statistics, seed: int, device: torch.device) -> dict[str, Any]:
    size = min(_KID_SUBSET_SIZE, len(reference.features), len(samples.features))
    width = reference.features.shape[1]
    with _quiet():
        metric = KernelInceptionDistance(_Identity(width), _KID_SUBSETS, size, sync_on_compute=False).to(device)
    metric.update(reference.features.to(device).double(), real=True)
    metric.update(samples.features.to(device).double(), real=False)
    with _seeded(seed):
        mean, std = metric.compute()
    return {"value": float(mean), "std": float(std), "subsets": _KID_SUBSETS, "subset_size": size}


def _score(samples: _Statistics, seed: int, device: torch.device) -> dict[str, Any]:
    with _quiet():
        metric = InceptionScore(_Identity(samples.logits.shape[1]), _SCORE_SPLITS, sync_on_compute=False).to(device)
    metric.update(samples.logits.to(device).double())
    with _seeded(seed):
        mean, std = metric.compute()
    return {"value": float(mean), "std": float(std), "splits": _SCORE_SPLITS}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torchmetrics' warning that it keeps all features, which is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        yield


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds torch's global CPU generator, from which torchmetrics draws its subsets, and restores it."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _write(path: Path, key: str, statistics: _Statistics) -> None:
    tensors = {
        "count": statistics.count.reshape(1),
        "total": statistics.total,
        "outer": statistics.outer.contiguous(),
        "features": statistics.features.contiguous(),
    }
    unfinished = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished, {"key": key, "checksum": tensors_md5(tensors)})
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        rank_zero_warn(f"the reference statistics cannot be kept in {path.parent} ({error}): name another folder as 'cache'")
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _read(path: Path, key: str) -> _Statistics | None:
    """Returns the statistics of a file, or None if it is missing or, with a warning, damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        rank_zero_warn(f"{path} is damaged ({error}): its statistics are computed anew")
        return None
    if metadata.get("key") != key or metadata.get("checksum") != tensors_md5(tensors):
        rank_zero_warn(f"{path} is damaged (its checksum is wrong): its statistics are computed anew")
        return None
    none = torch.empty(0, 0)
    return _Statistics(tensors["count"][0], tensors["total"], tensors["outer"], tensors["features"], none)

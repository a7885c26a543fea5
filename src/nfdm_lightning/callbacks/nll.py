"""The bound on the negative log-likelihood, in nats and bits/dim, with standard errors."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from nfdm_lightning.bound import averaged, bits_per_dim, indexed_draws
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.labels import Batch
from nfdm_lightning.module import NeuralDiffusion


class MeanAndError(Metric):
    """Mean and standard error of per-sample values, over all processes.

    The standard error is that of the mean over independent samples, std / sqrt(N).
    """

    full_state_update = False
    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "squares", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        values = values.to(self.total.device).double()
        self.total += values.sum()
        self.squares += (values**2).sum()
        self.count += values.numel()

    def compute(self) -> tuple[Tensor, Tensor]:
        mean = self.total / self.count
        variance = (self.squares / self.count - mean**2).clamp_min(0) * self.count / (self.count - 1).clamp_min(1)
        return mean, (variance / self.count).sqrt()


class NLL(Callback):
    """Evaluates the bound in validation and test: each term in nats, their sum in bits/dim, with standard errors.

    Logs ``{val,test}/bits_per_dim``, ``.../bits_per_dim_se``, ``.../nats``, ``.../nats_se`` and each term by name. Every
    sample is evaluated at ``draws`` stratified times; its numbers depend on its place in the data alone, so the value is
    the same for any batch size and any number of processes, and checkpoints compare without the jitter of random draws.
    The standard error is over the data and the draws together. For a conditional model it is the bound given the labels.

    Args:
        draws: draws of time and noise per sample in validation.
        test_draws: the same in test.
        seed: of the draws.
        antithetic: whether every second draw of a sample has the noise of the one before with the opposite sign; the
            variance of the estimate was larger with it wherever it was measured (RESULTS.md).
        importance: whether the times have the density that the model's AdaptiveTimes has learned, for less variance of the
            estimate of the same bound; the draws of two checkpoints then differ.
    """

    def __init__(
        self, draws: int = 4, test_draws: int = 32, seed: int = 0, antithetic: bool = False, importance: bool = False
    ) -> None:
        if draws < 1 or test_draws < 1:
            raise ConfigError(f"nll.draws={draws} and nll.test_draws={test_draws} must be at least 1")
        self.draws, self.test_draws, self.seed = draws, test_draws, seed
        self.antithetic, self.importance = antithetic, importance
        self._metrics: dict[str, MeanAndError] = {}
        self._seen = 0
        self.seconds = 0.0
        """How long the latest evaluation took."""
        self._begin = 0.0

    def _start(self, pl_module: LightningModule) -> None:
        names = ("nats", "reconstruction", "diffusion", "prior")
        device = "cpu" if pl_module.device.type == "mps" else pl_module.device  # float64 is unknown to the former
        self._metrics = {name: MeanAndError().to(device) for name in names}
        self._seen = 0
        self._begin = time.perf_counter()

    def _update(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, draws: int) -> None:
        assert isinstance(pl_module, NeuralDiffusion), "the NLL callback measures a NeuralDiffusion"
        target = pl_module.target(batch).to(pl_module.dtype)
        place = self._seen + torch.arange(len(target))
        index = trainer.global_rank + trainer.world_size * place
        self._seen += len(target)
        times = pl_module.times if self.importance else None
        numbers = (indexed_draws(target, index, draw, draws, self.seed, self.antithetic, times) for draw in range(draws))
        terms = averaged(lambda one: pl_module.bound(batch, one), numbers)
        for name, values in {"nats": torch.stack(list(terms.values())).sum(0), **terms}.items():
            self._metrics[name].update(values)

    def _log(self, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, NeuralDiffusion)
        results: dict[str, Tensor] = {}
        self.seconds = time.perf_counter() - self._begin
        for name, metric in self._metrics.items():
            mean, error = metric.compute()
            if name == "nats":
                results |= {f"{stage}/nats": mean, f"{stage}/nats_se": error}
                bits = bits_per_dim(torch.stack([mean, error]), pl_module.dimensions)
                results |= {f"{stage}/bits_per_dim": bits[0], f"{stage}/bits_per_dim_se": bits[1]}
            else:
                results[f"{stage}/{name}_nats"] = mean
        # the metrics have been reduced over the processes above: every rank logs the same numbers
        pl_module.log_dict({name: value.float() for name, value in results.items()}, rank_zero_only=False)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._update(trainer, pl_module, batch, self.draws)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._update(trainer, pl_module, batch, self.test_draws)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, "test")

"""What a run was trained on and how fast, kept in its checkpoints."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nfdm_lightning.callbacks.ema import EMA
from nfdm_lightning.data import DataModule
from nfdm_lightning.labels import unpack
from nfdm_lightning.provenance import commit


class TrainingRecord(Callback):
    """Keeps in every checkpoint what a report has to say of the training: data, settings, code, samples and seconds.

    Logs ``train/samples_per_second`` too, over the steps since the last log, of all processes together. Seconds are those of
    training alone, without validation and without waiting for the device after each step; they go on through stops and
    resumptions.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.seconds = 0.0
        self.settings: dict[str, Any] = {}
        self._since = 0.0
        self._step = 0
        self._logged = (0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "seconds": self.seconds, **self.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples, self.seconds = state_dict["samples"], state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        known = isinstance(data, DataModule)
        averages = [callback.decay for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
        self.settings = {
            "data": data.record() if known else None,
            "batch_size": data.batch_size if known else None,
            "processes": trainer.world_size,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "precision": trainer.precision,
            "ema_decay": averages[0] if averages else 0.0,
            "commit": commit(),
        }
        self._step, self._logged = trainer.global_step, (self.samples, self.seconds)
        self._start()

    def _start(self) -> None:
        self._since = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, size = time.perf_counter(), len(unpack(batch)[0])
        self.samples += size * trainer.world_size
        self.seconds += now - self._since
        self._since = now
        if trainer.global_step == self._step:  # amid an accumulation of gradients
            return
        self._step = trainer.global_step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._step % every == 0 and self.seconds > self._logged[1]:
            samples, seconds = self._logged
            rate = (self.samples - samples) / (self.seconds - seconds)
            pl_module.log("train/samples_per_second", rate, batch_size=size)
            self._logged = (self.samples, self.seconds)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start()  # a validation amid an epoch does not count


def training_record(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint says of its training; empty if it was made without the callback."""
    record: dict[str, Any] = checkpoint.get("callbacks", {}).get(TrainingRecord.__qualname__, {})
    return record


def holds_average(checkpoint: dict[str, Any]) -> bool:
    """Returns whether the weights that a checkpoint is evaluated with are an average."""
    averaged = "current_model_state" in checkpoint  # Lightning's mark, which a decay of 0 leaves too
    return averaged and training_record(checkpoint).get("ema_decay") != 0.0

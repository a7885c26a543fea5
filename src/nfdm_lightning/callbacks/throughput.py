"""How fast a run trains."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Counts samples and seconds of training, without validation and without waiting for the device after each step.

    Logs ``train/samples_per_second`` over the steps since the last log, of all processes together. Samples and seconds of
    the whole run are kept in its checkpoints, through stops and resumptions.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.seconds = 0.0
        self._since = 0.0
        self._recent = (0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples, self.seconds = state_dict["samples"], state_dict["seconds"]

    def _start(self) -> None:
        self._since = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.device_ids and pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self._recent = (self.samples, self.seconds)
        self._start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.samples += len(batch) * trainer.world_size
        self.seconds += now - self._since
        self._since = now
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (trainer.global_step + 1) % every == 0 and self.seconds > self._recent[1]:
            samples, seconds = self._recent
            rate = (self.samples - samples) / (self.seconds - seconds)
            pl_module.log("train/samples_per_second", rate, batch_size=len(batch))
            self._recent = (self.samples, self.seconds)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start()  # a validation amid an epoch does not count

"""Checkpoints of a run, and stopping it between two steps when asked to."""

import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException


class StoppedByUser(KeyboardInterrupt):
    """Ctrl+C, raised between two training steps."""


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt``: every few steps, when the run ends, and when it is stopped by a signal.

    Apart from the best checkpoint on purpose: Lightning's ``save_last`` together with ``monitor`` goes stale whenever the
    monitored value does not improve. After an error nothing is written, so the last good state stays.

    Args:
        every_n_train_steps: steps between saves.
    """

    def __init__(self, every_n_train_steps: int = 500) -> None:
        super().__init__(
            filename="last",
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
            save_on_exception=True,
        )

    def _save(self, trainer: Trainer) -> None:
        if self._last_global_step_saved != trainer.global_step and not getattr(trainer, "fast_dev_run", False):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, (SIGTERMException, StoppedByUser)) and not trainer.sanity_checking:
            self._save(trainer)


class StopBetweenSteps(Callback):
    """Makes Ctrl+C wait for the end of the training step, so that the checkpoint it leaves is of one whole step.

    Under gradient accumulation it waits for the optimiser's step; several processes stop at the same one. A second Ctrl+C
    stops at once.
    """

    def __init__(self) -> None:
        self._asked = False
        self._step = 0
        self._previous: Any = None

    def _ask(self, signum: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._asked, self._step = False, trainer.global_step
        if threading.current_thread() is threading.main_thread():  # the only one that may
            self._previous = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        asked = self._asked
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            raise StoppedByUser

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()


class PredictionWriter(BasePredictionWriter):
    """Writes what ``lightning predict`` computes, the bound of each test sample in nats, to ``predictions_rank{r}.npz``
    in the run's folder: ``index``, the sample's place in the test split, and ``nats``.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any) -> None:
        nats = torch.cat([batch.cpu() for batch in predictions]).numpy()
        index = trainer.global_rank + trainer.world_size * np.arange(len(nats))
        path = Path(trainer.default_root_dir) / f"predictions_rank{trainer.global_rank}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        with open(unfinished, "wb") as file:
            np.savez(file, index=index, nats=nats)
        unfinished.replace(path)
        print(f"wrote {path}")

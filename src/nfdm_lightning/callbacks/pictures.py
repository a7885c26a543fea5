"""Callbacks that draw: a grid of samples, and trajectories from the prior to the data."""

import abc
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from nfdm_lightning import pictures
from nfdm_lightning.data import DataModule
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.processes import Obstacle
from nfdm_lightning.solvers import Ancestral, Heun, Solver


class _Picture(Callback, abc.ABC):
    """Draws after validation, every few epochs, and after a test: with the averaged weights, from the same noise.

    Of a conditional model it draws the classes in turn, without guidance.
    """

    name: str

    def __init__(self, number: int, solver: Solver, every_n_epochs: int, seed: int) -> None:
        if number < 1 or every_n_epochs < 1:
            raise ConfigError(
                f"{type(self).__name__}: number={number} and every_n_epochs={every_n_epochs} must be at least 1"
            )
        self.number, self.solver, self.every_n_epochs, self.seed = number, solver, every_n_epochs, seed

    @abc.abstractmethod
    def draw(self, model: NeuralDiffusion, generator: torch.Generator, source: Tensor | None) -> np.ndarray:
        """Returns the pixels."""

    def _save(self, trainer: Trainer, pl_module: LightningModule, suffix: str) -> None:
        assert isinstance(pl_module, NeuralDiffusion), f"{type(self).__name__} draws samples of a NeuralDiffusion"
        log_dir = trainer.log_dir  # asked for by every rank: it is broadcast
        if not trainer.is_global_zero:
            return
        pixels = self.draw(pl_module, torch.Generator().manual_seed(self.seed), self._source(trainer, pl_module))
        folder = Path(log_dir or trainer.default_root_dir) / "pictures"
        pictures.save_png(pixels, folder / f"{self.name}_{suffix}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(self.name, pixels, trainer.global_step, dataformats="HWC")

    def _source(self, trainer: Trainer, model: NeuralDiffusion) -> Tensor | None:
        if not model.reverse.process.takes_source:
            return None
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, DataModule):
            raise ConfigError(
                f"{type(self).__name__} draws a bridge from its source samples: train it on a Pairs DataModule"
            )
        return data.sources(self.number, "val")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._save(trainer, pl_module, f"step{trainer.global_step:07d}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, pl_module, "test")


class SampleGrid(_Picture):
    """Draws a grid of samples (a scatter plot for points) to ``pictures/`` in the run's folder and to TensorBoard.

    Args:
        number: samples.
        solver: how to sample; the SDE in 100 steps by default.
        every_n_epochs: epochs between pictures, at validation.
        seed: of the noise.
    """

    name = "samples"

    def __init__(self, number: int = 64, solver: Solver | None = None, every_n_epochs: int = 1, seed: int = 0) -> None:
        super().__init__(number, solver or Ancestral(), every_n_epochs, seed)

    def draw(self, model: NeuralDiffusion, generator: torch.Generator, source: Tensor | None) -> np.ndarray:
        labels = model.labels_in_turn(self.number)
        samples, _ = model.sample(self.number, self.solver, generator, source=source, label=labels)
        return pictures.sample_grid(samples, pictures.columns_of(labels), source)


class Trajectories(_Picture):
    """Draws how samples move from the prior to the data: paths over the plane, or rows of images.

    Args:
        number: trajectories.
        solver: how to sample; the ODE by Heun's method in 100 evaluations by default.
        every_n_epochs: epochs between pictures, at validation.
        seed: of the noise.
    """

    name = "trajectories"

    def __init__(self, number: int = 200, solver: Solver | None = None, every_n_epochs: int = 1, seed: int = 0) -> None:
        super().__init__(number, solver or Heun(), every_n_epochs, seed)

    def draw(self, model: NeuralDiffusion, generator: torch.Generator, source: Tensor | None) -> np.ndarray:
        labels = model.labels_in_turn(self.number)
        _, solution = model.sample(self.number, self.solver, generator, trajectory=True, source=source, label=labels)
        process, solver = type(model.reverse.process).__name__, type(self.solver).__name__
        title, start = f"{process}: {solver}, {solution.nfe} evaluations", "prior" if source is None else "source"
        obstacles = [penalty for penalty in model.penalties if isinstance(penalty, Obstacle)]
        return pictures.trajectories(solution.times, solution.trajectory, title, start, obstacles)

"""Callbacks: evaluation, averaging, pictures, checkpoints and health."""

from nfdm_lightning.callbacks.checkpoints import LastCheckpoint, PredictionWriter, StopBetweenSteps, StoppedByUser
from nfdm_lightning.callbacks.ema import EMA
from nfdm_lightning.callbacks.fid import FID
from nfdm_lightning.callbacks.health import HealthCheck
from nfdm_lightning.callbacks.nll import NLL, MeanAndError
from nfdm_lightning.callbacks.pictures import SampleGrid, Trajectories
from nfdm_lightning.callbacks.training_record import TrainingRecord

__all__ = [
    "EMA",
    "FID",
    "NLL",
    "HealthCheck",
    "LastCheckpoint",
    "MeanAndError",
    "PredictionWriter",
    "SampleGrid",
    "StopBetweenSteps",
    "StoppedByUser",
    "TrainingRecord",
    "Trajectories",
]

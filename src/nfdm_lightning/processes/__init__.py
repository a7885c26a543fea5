"""Forward-process plug-ins."""

from nfdm_lightning.processes.base import AffineProcess, ForwardProcess, Moments, PathPoint
from nfdm_lightning.processes.gaussian import Gaussian
from nfdm_lightning.processes.ndm import NDM
from nfdm_lightning.processes.nfdm import NFDM
from nfdm_lightning.processes.schedules import Cosine, LearnedMonotone, LinearFlow, Schedule, VariancePreserving

__all__ = [
    "NDM",
    "NFDM",
    "AffineProcess",
    "Cosine",
    "ForwardProcess",
    "Gaussian",
    "LearnedMonotone",
    "LinearFlow",
    "Moments",
    "PathPoint",
    "Schedule",
    "VariancePreserving",
]

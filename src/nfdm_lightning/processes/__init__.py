"""Forward-process plug-ins."""

from nfdm_lightning.processes.base import AffineProcess, ForwardProcess, Moments, PathPoint
from nfdm_lightning.processes.bridge import Bridge
from nfdm_lightning.processes.flow_nfdm import FlowNFDM
from nfdm_lightning.processes.flows import AffineCoupling, ConditionalFlow, SplineCoupling
from nfdm_lightning.processes.gaussian import Gaussian
from nfdm_lightning.processes.mulan import MuLAN
from nfdm_lightning.processes.ndm import NDM
from nfdm_lightning.processes.nfdm import NFDM
from nfdm_lightning.processes.nfdm_ot import NFDMOT
from nfdm_lightning.processes.penalties import Curvature, Obstacle, Penalty
from nfdm_lightning.processes.schedules import Cosine, LearnedMonotone, LinearFlow, Schedule, VariancePreserving
from nfdm_lightning.processes.separable import SeparableNFDM

__all__ = [
    "NDM",
    "NFDM",
    "NFDMOT",
    "AffineCoupling",
    "AffineProcess",
    "Bridge",
    "ConditionalFlow",
    "Cosine",
    "Curvature",
    "FlowNFDM",
    "ForwardProcess",
    "Gaussian",
    "LearnedMonotone",
    "LinearFlow",
    "Moments",
    "MuLAN",
    "Obstacle",
    "PathPoint",
    "Penalty",
    "Schedule",
    "SeparableNFDM",
    "SplineCoupling",
    "VariancePreserving",
]

"""Diffusion models with learnable forward processes (NDM, NFDM) as PyTorch Lightning plug-ins.

The names below are imported when they are first used, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nfdm_lightning.callbacks import EMA, NLL, HealthCheck, SampleGrid, Trajectories
    from nfdm_lightning.data import DataModule, Digits, Files, Pairs, Toy2D
    from nfdm_lightning.module import NeuralDiffusion
    from nfdm_lightning.networks import ResidualMLP, UNet
    from nfdm_lightning.predictor import EpsPrediction, LevelPrediction, VPrediction, XPrediction
    from nfdm_lightning.processes import (
        NDM,
        NFDM,
        NFDMOT,
        AffineProcess,
        Bridge,
        Curvature,
        FlowNFDM,
        ForwardProcess,
        Gaussian,
        MuLAN,
        Obstacle,
        Penalty,
        SeparableNFDM,
    )
    from nfdm_lightning.solvers import Adaptive, Ancestral, Euler, EulerMaruyama, Heun, TorchSDE

_HOMES = {
    "callbacks": ("EMA", "NLL", "HealthCheck", "SampleGrid", "Trajectories"),
    "data": ("DataModule", "Digits", "Files", "Pairs", "Toy2D"),
    "module": ("NeuralDiffusion",),
    "networks": ("ResidualMLP", "UNet"),
    "predictor": ("EpsPrediction", "LevelPrediction", "VPrediction", "XPrediction"),
    "processes": (
        "NDM",
        "NFDM",
        "NFDMOT",
        "AffineProcess",
        "Bridge",
        "Curvature",
        "FlowNFDM",
        "ForwardProcess",
        "Gaussian",
        "MuLAN",
        "Obstacle",
        "Penalty",
        "SeparableNFDM",
    ),
    "solvers": ("Adaptive", "Ancestral", "Euler", "EulerMaruyama", "Heun", "TorchSDE"),
}

__all__ = [
    "EMA",
    "NDM",
    "NFDM",
    "NFDMOT",
    "NLL",
    "Adaptive",
    "AffineProcess",
    "Ancestral",
    "Bridge",
    "Curvature",
    "DataModule",
    "Digits",
    "EpsPrediction",
    "Euler",
    "EulerMaruyama",
    "Files",
    "FlowNFDM",
    "ForwardProcess",
    "Gaussian",
    "HealthCheck",
    "Heun",
    "LevelPrediction",
    "MuLAN",
    "NeuralDiffusion",
    "Obstacle",
    "Pairs",
    "Penalty",
    "ResidualMLP",
    "SampleGrid",
    "SeparableNFDM",
    "TorchSDE",
    "Toy2D",
    "Trajectories",
    "UNet",
    "VPrediction",
    "XPrediction",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]

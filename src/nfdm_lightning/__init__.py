"""Diffusion models with learnable forward processes (NDM, NFDM) as PyTorch Lightning plug-ins.

The names below are imported when they are first used, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nfdm_lightning.callbacks import EMA, FID, NLL, HealthCheck, SampleGrid, Trajectories
    from nfdm_lightning.data import (
        AFHQ,
        CIFAR10,
        MNIST,
        CelebAHQ,
        DataModule,
        Digits,
        FashionMNIST,
        Files,
        ImageNet32,
        ImageNet64,
        Pairs,
        Toy2D,
    )
    from nfdm_lightning.labels import Labelled
    from nfdm_lightning.likelihood import ODE, Bound, ImportanceWeighted
    from nfdm_lightning.module import NeuralDiffusion
    from nfdm_lightning.networks import DiT, ResidualMLP, UNet, VDMUNet
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
    "callbacks": ("EMA", "FID", "NLL", "HealthCheck", "SampleGrid", "Trajectories"),
    "data": (
        "AFHQ",
        "CIFAR10",
        "MNIST",
        "CelebAHQ",
        "DataModule",
        "Digits",
        "FashionMNIST",
        "Files",
        "ImageNet32",
        "ImageNet64",
        "Pairs",
        "Toy2D",
    ),
    "labels": ("Labelled",),
    "likelihood": ("ODE", "Bound", "ImportanceWeighted"),
    "module": ("NeuralDiffusion",),
    "networks": ("DiT", "ResidualMLP", "UNet", "VDMUNet"),
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
    "AFHQ",
    "CIFAR10",
    "EMA",
    "FID",
    "MNIST",
    "NDM",
    "NFDM",
    "NFDMOT",
    "NLL",
    "ODE",
    "Adaptive",
    "AffineProcess",
    "Ancestral",
    "Bound",
    "Bridge",
    "CelebAHQ",
    "Curvature",
    "DataModule",
    "DiT",
    "Digits",
    "EpsPrediction",
    "Euler",
    "EulerMaruyama",
    "FashionMNIST",
    "Files",
    "FlowNFDM",
    "ForwardProcess",
    "Gaussian",
    "HealthCheck",
    "Heun",
    "ImageNet32",
    "ImageNet64",
    "ImportanceWeighted",
    "Labelled",
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
    "VDMUNet",
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

"""DataModules, one per benchmark, and one for data of a user's own."""

from nfdm_lightning.data.base import DataModule, to_levels
from nfdm_lightning.data.cifar import CIFAR10
from nfdm_lightning.data.digits import Digits
from nfdm_lightning.data.files import Files
from nfdm_lightning.data.folders import AFHQ, CelebAHQ
from nfdm_lightning.data.imagenet import ImageNet32, ImageNet64
from nfdm_lightning.data.mnist import MNIST, FashionMNIST
from nfdm_lightning.data.pairs import Pairs
from nfdm_lightning.data.toy2d import (
    Blob,
    Checkerboard,
    Density2D,
    Distribution2D,
    EightGaussians,
    Pinwheel,
    Toy2D,
    TwoMoons,
)

__all__ = [
    "AFHQ",
    "CIFAR10",
    "MNIST",
    "Blob",
    "CelebAHQ",
    "Checkerboard",
    "DataModule",
    "Density2D",
    "Digits",
    "Distribution2D",
    "EightGaussians",
    "FashionMNIST",
    "Files",
    "ImageNet32",
    "ImageNet64",
    "Pairs",
    "Pinwheel",
    "Toy2D",
    "TwoMoons",
    "to_levels",
]

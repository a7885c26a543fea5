"""DataModules, one per benchmark, and one for data of a user's own."""

from nfdm_lightning.data.base import DataModule
from nfdm_lightning.data.digits import Digits
from nfdm_lightning.data.files import Files
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
    "Blob",
    "Checkerboard",
    "DataModule",
    "Density2D",
    "Digits",
    "Distribution2D",
    "EightGaussians",
    "Files",
    "Pairs",
    "Pinwheel",
    "Toy2D",
    "TwoMoons",
]

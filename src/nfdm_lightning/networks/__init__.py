"""Networks: tensors in, tensors out. Any ``Callable[[Shape, Shape], nn.Module]`` whose module maps (x, t) serves as one.

One that sees class labels is built with the keyword ``num_classes`` too, and maps (x, t, label).
"""

from torch import nn

from nfdm_lightning.networks.dit import DiT
from nfdm_lightning.networks.mlp import ResidualMLP
from nfdm_lightning.networks.unet import UNet
from nfdm_lightning.networks.vdm_unet import VDMUNet

__all__ = ["DiT", "ResidualMLP", "UNet", "VDMUNet", "auto"]


def auto(in_shape: tuple[int, ...], out_shape: tuple[int, ...], num_classes: int | None = None) -> nn.Module:
    """Builds the default network of a shape: a UNet for images (C, H, W) of even height and width, else a ResidualMLP."""
    if len(in_shape) == 3 and in_shape[1] % 2 == 0 and in_shape[2] % 2 == 0:
        return UNet(in_shape, out_shape, num_classes=num_classes)
    return ResidualMLP(in_shape, out_shape, num_classes=num_classes)

r"""Features of images, between which callbacks measure Frechet and kernel distances.

Only torch-fidelity's Inception with its published weights gives a "FID"; a distance between any other features is named
after them, and its numbers compare with none in the literature.
"""

import abc
import hashlib
import io
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfdm_lightning.checksums import tensors_md5
from nfdm_lightning.errors import ConfigError

_PUBLISHED_INCEPTION = "6726825d"  # begins the sha256 of the file, and ends its name, as torch.hub has it


class FeatureExtractor(nn.Module, abc.ABC):
    """Base of what turns images into features; a subclass writes :meth:`extract` and, if it has weights, :meth:`prepare`.

    Args:
        name: of the features, for the names of the distances and of cached statistics.
        num_features: F, features of an image.
        num_logits: K, class logits of an image, for an inception score; None if it has none.
        resizing: how images are resized, for the record.
    """

    def __init__(self, name: str, num_features: int, num_logits: int | None = None, resizing: str = "none") -> None:
        super().__init__()
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"features: name={name!r} must be of letters, digits, '.', '-' and '_'")
        if num_features < 1:
            raise ConfigError(f"features: num_features={num_features} must be at least 1")
        self.name, self.num_features, self.num_logits, self.resizing = name, num_features, num_logits, resizing
        self.weights_md5: str | None = None
        """MD5 of the weights, known once they are read."""

    @property
    def label(self) -> str:
        """What the Frechet distance may be called: ``fid`` for the published Inception alone."""
        return f"fd_{self.name}"

    @property
    def kernel_label(self) -> str:
        """What the kernel distance may be called."""
        return f"kd_{self.name}"

    @property
    def score_label(self) -> str:
        """What the inception score may be called."""
        return f"score_{self.name}"

    def identity(self) -> dict[str, Any]:
        """Returns what the features depend on, in plain JSON values: a key for what is computed from them."""
        return {
            "extractor": type(self).__name__,
            "features": self.name,
            "num_features": self.num_features,
            "weights_md5": self.weights_md5 or _state_md5(self),
            "resizing": self.resizing,
        }

    def prepare(self) -> None:
        """Reads the weights, once, and is called before all else: an extractor that nobody uses costs nothing.

        Raises:
            ConfigError: the weights are missing or of another network.
        """

    @abc.abstractmethod
    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns features (B, F) and logits (B, K), or None, of uint8 images (B, 3, H, W) of levels 0 .. 255."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns features and logits of a batch.

        Args:
            images: levels 0 .. 255, uint8, (B, C, H, W); a single channel is repeated to three.

        Returns:
            Features, (B, F), and class logits, (B, K), or None.

        Raises:
            ConfigError: these are no images, or the features have another shape than was said.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ConfigError(
                f"{self.name} takes uint8 images of 1 or 3 channels, (B, C, H, W), not {images.dtype} {tuple(images.shape)}"
            )
        features, logits = self.extract(images.expand(-1, 3, -1, -1))
        if features.shape != (len(images), self.num_features):
            raise ConfigError(
                f"{self.name}: the features of {len(images)} images have shape {tuple(features.shape)}, not "
                f"{(len(images), self.num_features)}; set num_features, and let the network pool over the image"
            )
        return features, logits


class Inception(FeatureExtractor):
    """The Inception v3 of the FID, as torch-fidelity has it: 2048 pooled features and the logits without their bias.

    Images are resized to 299 x 299 as TensorFlow 1 did: bilinear, without antialiasing.

    Args:
        weights: torch-fidelity's weights file; None downloads it once to torch's hub folder. With any other weights the
            distances are not called FID, KID and inception score.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__("inception-v3-compat", 2048, 1008, "299x299, bilinear as in TensorFlow 1 (torch-fidelity)")
        if weights is not None:
            _check_file(weights, "Inception")
        self.weights = weights
        self.published = False

    @property
    def label(self) -> str:
        return "fid" if self.published else super().label

    @property
    def kernel_label(self) -> str:
        return "kid" if self.published else super().kernel_label

    @property
    def score_label(self) -> str:
        return "inception_score" if self.published else super().score_label

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "torch_fidelity": metadata.version("torch-fidelity")}

    def prepare(self) -> None:
        if self.weights_md5 is not None:
            return
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        path = Path(self.weights) if self.weights is not None else _download(URL_INCEPTION_V3)
        state = _read_weights(path, "Inception")
        # torch-fidelity unpickles what it is given: it is given what has been read safely and written anew
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"], buffer)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f"{path} does not hold the weights of torch-fidelity's Inception: {_brief(error)}") from None
        self.published = _digest(path, "sha256").startswith(_PUBLISHED_INCEPTION)
        self.weights_md5 = _digest(path, "md5")

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.network(images)
        return features, logits


class _ResidualBlock(nn.Module):
    """Two convolutions and a shortcut without weights: every second pixel, and channels of zeros on both sides."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.stride = channels // channels_in
        self.padding = (channels - channels_in) // 2
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(shortcut + self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x))))))


class _ResNet56(nn.Module):
    """The ResNet for CIFAR-10 with 56 layers and shortcuts of option A (arXiv 1512.03385, section 4.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(_ResidualBlock(channels_in, channels), *(_ResidualBlock(channels, channels) for _ in range(8)))
            for channels_in, channels in ((16, 16), (16, 32), (32, 64))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.relu(self.bn1(self.conv1(x)))
        features = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return features, self.linear(features)


class CifarResNet(FeatureExtractor):
    """A ResNet-56 trained to classify CIFAR-10: its 64 pooled features and 10 logits. For where Inception cannot be had.

    Images keep their size, which should be 32 x 32. Its distances are small numbers of their own, not FIDs.

    Args:
        weights: ``resnet56-4bfd9763.th`` of github.com/akamaster/pytorch_resnet_cifar10.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str) -> None:
        super().__init__("cifar-resnet56", 64, 10)
        _check_file(weights, "CifarResNet")
        self.weights = weights
        # those of ImageNet, which it was trained with
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406], dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225], dtype=torch.float32)[:, None, None])

    def prepare(self) -> None:
        if self.weights_md5 is not None:
            return
        path = Path(self.weights)
        content = _read_weights(path, "CifarResNet")
        network = _ResNet56().float()
        try:
            state = {name.removeprefix("module."): value for name, value in content["state_dict"].items()}
            network.load_state_dict(state)
        except (RuntimeError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{path} does not hold the weights of a CIFAR-10 ResNet-56: {_brief(error)}") from None
        self.network = network.requires_grad_(False).eval()
        self.weights_md5 = _digest(path, "md5")

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.network((images.to(self.mean.dtype) / 255 - self.mean) / self.std)
        return features, logits


class NetworkFeatures(FeatureExtractor):
    """The features of any network: a module that maps float images in [0, 1], (B, 3, H, W), to (B, F).

    Args:
        network: builds it, with its weights.
        name: what the features are called.
        num_features: F.
    """

    def __init__(self, network: Callable[[], nn.Module], name: str, num_features: int) -> None:
        super().__init__(name, num_features)
        self.build = network

    def prepare(self) -> None:
        if self.weights_md5 is not None:
            return
        self.network = self.build().requires_grad_(False).eval()
        self.weights_md5 = _state_md5(self.network)

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        dtype = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), torch.float32)
        return self.network(images.to(dtype) / 255), None


def _check_file(weights: str, name: str) -> None:
    if not Path(weights).is_file():
        raise ConfigError(f"{name}: there is no weights file {weights}")


def _download(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=_PUBLISHED_INCEPTION, progress=False)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"the weights of Inception cannot be downloaded ({_brief(error)}): fetch {url} elsewhere and give its path as "
            "'weights' of nfdm_lightning.features.Inception (features.init_args.weights in YAML), or use other features"
        ) from None
    return path


def _read_weights(path: Path, name: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on a damaged file
        raise ConfigError(f"{name}: {path} is not a readable weights file ({_brief(error)}); fetch it again") from None


def _state_md5(module: nn.Module) -> str:
    return tensors_md5(module.state_dict(), type(module).__qualname__)


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]

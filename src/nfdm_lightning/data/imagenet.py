"""ImageNet at 32x32 and 64x64, of which two versions are in use that must not be mixed."""

from typing import Any, ClassVar, Literal, get_args

import torch

from nfdm_lightning.data.benchmark import Benchmark, Split
from nfdm_lightning.data.storage import load_array, mapped_images, md5_of, read_json
from nfdm_lightning.errors import ConfigError, DataError

ImageNetVersion = Literal["pixelrnn", "downsampled"]
ORIGIN = "origin.json"
"""Written by scripts/convert_imagenet.py beside the arrays: which version they are."""
_SIZES = {
    "pixelrnn": {"train": 1_281_149, "val": 49_999},
    "downsampled": {"train": 1_281_167, "val": 50_000},
}
_WHERE = {
    "pixelrnn": "train_{size}x{size}.tar and valid_{size}x{size}.tar, which image-net.org no longer offers",
    "downsampled": "the npz files of downsampled ImageNet {size}x{size} at image-net.org, which needs an account,",
}


class ImageNet(Benchmark):
    """ImageNet in ``imagenet<size>_<version>/``: ``train.npy`` and ``val.npy``, uint8 (N, 3, size, size), memory-mapped, as
    scripts/convert_imagenet.py writes them, in a fixed random order.

    The versions differ in how they were made smaller, and by some 0.25 bits per dimension:

    * ``pixelrnn``: that of PixelRNN (van den Oord et al. 2016), on which Glow, VDM and others of their time report;
      without labels, and withdrawn since;
    * ``downsampled``: that of Chrabaszcz et al. 2017, averaged over boxes, as image-net.org offers it.

    The official validation images are for test; the last 10,000 training images are for validation.

    Args:
        version: pixelrnn or downsampled.
        root: folder of all benchmarks; None for the environment variable NFDM_DATA, or else ``data``.
        verify: whether version and number of images must be as published; false for data of one's own in the same format.
        batch_size: samples per step and process.
        eval_batch_size: samples per step and process in validation, test and prediction.
        num_workers: loader processes.
        seed: of the order of the training data; the splits are fixed.
        flip: whether training images are mirrored left to right at random.
        labels: whether batches carry the class of each sample, for a conditional model.

    Raises:
        DataError: files that are missing, damaged, or of the other version.
    """

    size: ClassVar[int]

    def __init__(
        self,
        version: ImageNetVersion,
        root: str | None = None,
        verify: bool = True,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        flip: bool = False,
        labels: bool = False,
    ) -> None:
        super().__init__(root, verify, None, batch_size, eval_batch_size, num_workers, seed, flip, labels)
        if version not in get_args(ImageNetVersion):
            raise ConfigError(
                f"data.version={version}: there are {' and '.join(get_args(ImageNetVersion))}, and they differ"
            )
        self.version = version
        self.folder = self.root / f"imagenet{self.size}_{version}"

    @property
    def class_count(self) -> int | None:
        return 1000 if self.version == "downsampled" else None

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    def prepare_data(self) -> None:
        for name in ("train", "val"):
            if not (path := self.folder / f"{name}.npy").is_file():
                where = _WHERE[str(self.version)].format(size=self.size)
                raise DataError(
                    f"{path} is missing: get {where} and run scripts/convert_imagenet.py --size={self.size} "
                    f"--version={self.version} --out={self.root}"
                )

    def read(self) -> dict[str, Split]:
        origin = read_json(self.folder / ORIGIN).get("version", "of unknown version")
        if self.verify and origin != self.version:
            raise DataError(
                f"{self.folder} is {origin}, not {self.version}, by its {ORIGIN}: convert the files again with "
                "scripts/convert_imagenet.py, or set data.verify=false for data of your own"
            )
        train, test = self._read("train"), self._read("val")
        held = max(min(10_000, len(train.images) // 10), 1)
        labels = train.labels
        return {
            "train": Split(train.images[:-held], None if labels is None else labels[:-held]),
            "val": Split(train.images[-held:], None if labels is None else labels[-held:]),
            "test": test,
        }

    def _read(self, name: str) -> Split:
        path = self.folder / f"{name}.npy"
        images = mapped_images(path, self.shape)
        expected = _SIZES[str(self.version)][name]
        if self.verify and len(images) != expected:
            raise DataError(
                f"{path} has {len(images)} images, not the {expected} of {self.version}: convert all files again, or set "
                "data.verify=false for data of your own"
            )
        labels_path = self.folder / f"{name}_labels.npy"
        if not labels_path.is_file():
            return Split(images, None)
        labels = torch.from_numpy(load_array(labels_path)).long()
        if labels.shape != (len(images),):
            raise DataError(f"{labels_path} has shape {tuple(labels.shape)} for {len(images)} images: convert again")
        return Split(images, labels)

    def content(self) -> list[str]:
        return [md5_of(self.folder / f"{name}.npy") for name in ("train", "val")]

    def record(self) -> dict[str, Any]:
        return {**super().record(), "origin": read_json(self.folder / ORIGIN)}


class ImageNet32(ImageNet):
    """ImageNet at 32x32; versions, arguments and errors are those of :class:`ImageNet`."""

    size = 32


class ImageNet64(ImageNet):
    """ImageNet at 64x64; versions, arguments and errors are those of :class:`ImageNet`."""

    size = 64

"""CelebA-HQ and AFHQ: folders of images, made smaller once and memory-mapped from then on."""

import abc
import hashlib
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nfdm_lightning.data.benchmark import Benchmark, Split
from nfdm_lightning.data.files import image_files, open_image
from nfdm_lightning.data.storage import mapped_images, md5_of, partial_file, read_json, write_json
from nfdm_lightning.errors import ConfigError, DataError

Resample = Literal["box", "lanczos"]
AFHQVersion = Literal["v1", "v2"]
_FILTERS = {"box": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}


def resized(folder: Path, size: int, resample: Resample, cache: Path) -> Tensor:
    """Returns all images of a folder in colour, (N, 3, size, size), memory-mapped, in a fixed random order.

    They are made smaller once and kept at ``cache``, until a name, size or time among the folder's images changes.

    Args:
        folder: searched recursively.
        size: height and width.
        resample: box, the mean over the pixels that a new one covers, or lanczos, which is sharper.
        cache: the ``.npy`` file.

    Raises:
        DataError: no images, or one that is unreadable, not square, or too small.
    """
    files = image_files(folder)
    listing = hashlib.md5(usedforsecurity=False)
    for file in files:
        stat = file.stat()
        listing.update(f"{file.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    made_of = {"listing": listing.hexdigest(), "size": size, "resample": resample}
    note = cache.with_suffix(".json")
    if not (cache.is_file() and read_json(note) == made_of):
        note.unlink(missing_ok=True)
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
        with partial_file(cache) as target:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), 3, size, size)}
            np.lib.format.write_array_header_1_0(target, header)
            for place in order:
                target.write(_shrunk(files[place], size, resample).tobytes())
        write_json(note, made_of)
    return mapped_images(cache, (3, size, size))


def _shrunk(file: Path, size: int, resample: Resample) -> np.ndarray:
    image = open_image(file, str(file)).convert("RGB")
    if image.width != image.height or image.width < size:
        raise DataError(f"{file} is {image.height}x{image.width}: squares of at least {size}x{size} are expected")
    if image.width != size:
        image = image.resize((size, size), _FILTERS[resample])
    return np.asarray(image).transpose(2, 0, 1)


class ImageFolders(Benchmark):
    """Base of the benchmarks that are folders of images: see :func:`resized`.

    Args:
        folder: of the benchmark, below the root.
        size: height and width to which the images are made smaller.
        resample: box or lanczos.
        root: folder of all benchmarks; None for the environment variable NFDM_DATA, or else ``data``.
        verify: whether the number of images must be as published.
        classes: names or numbers of the classes that are kept; None keeps all.
        batch_size: samples per step and process.
        eval_batch_size: samples per step and process in validation, test and prediction.
        num_workers: loader processes.
        seed: of the order of the training data; the splits are fixed.
        flip: whether training images are mirrored left to right at random.
        labels: whether batches carry the class of each sample, for a conditional model.
    """

    source: ClassVar[str]
    """Where the images come from, for messages."""

    def __init__(
        self,
        folder: str,
        size: int,
        resample: Resample,
        root: str | None,
        verify: bool,
        classes: list[str | int] | None,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        seed: int,
        flip: bool,
        labels: bool = False,
    ) -> None:
        super().__init__(root, verify, classes, batch_size, eval_batch_size, num_workers, seed, flip, labels)
        if size < 1:
            raise ConfigError(f"data.size={size} must be at least 1")
        if resample not in _FILTERS:
            raise ConfigError(f"data.resample={resample}: there are {' and '.join(_FILTERS)}")
        self.folder, self.size, self.resample = self.root / folder, size, resample
        self.cache = self.root / f"{folder}_{size}_{resample}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    def parts(self) -> tuple[Path, Path | None]:
        """Returns the folder of the images for training and, if there is one, that for test."""
        if not self.folder.is_dir():
            raise DataError(f"{self.folder} is missing: {self.source}, and unpack it there, or set data.root or NFDM_DATA")
        train = self.folder / "train"
        tests = (self.folder / name for name in ("test", "val"))
        return (train, next((test for test in tests if test.is_dir()), None)) if train.is_dir() else (self.folder, None)

    @abc.abstractmethod
    def members(self) -> list[tuple[str, int]]:
        """Returns the folders of the kept classes, "" for the part's own, and their classes."""

    @abc.abstractmethod
    def published(self, part: str, member: str) -> int:
        """Returns how many images there should be in a class's folder of a part: train, test, or all."""

    def prepare_data(self) -> None:
        self._images()

    def _paths(self) -> list[Path]:
        names = ["train", "test"] if self.parts()[1] else ["all"]
        return [
            self.cache / f"{'_'.join(filter(None, (name, member)))}.npy" for name in names for member, _ in self.members()
        ]

    def _images(self) -> list[Tensor]:
        train, test = self.parts()
        folders = [part / member for part in (train, test) if part is not None for member, _ in self.members()]
        found = []
        for folder, path in zip(folders, self._paths(), strict=True):
            if not folder.is_dir():
                raise DataError(f"{folder} is missing: {self.source}, and unpack it again")
            if self.verify:
                part, _, member = path.stem.partition("_")
                number, expected = len(image_files(folder)), self.published(part, member)
                if number != expected:
                    raise DataError(
                        f"{folder} has {number} images, not {expected}: unpack it again, or set data.verify=false for data "
                        "of your own"
                    )
            found.append(resized(folder, self.size, self.resample, path))
        return found

    def read(self) -> dict[str, Split]:
        images, members = self._images(), self.members()
        pieces: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
        for place in range(len(members)):
            train = images[place]
            if len(images) > len(members):
                pieces["test"].append(images[len(members) + place])
            else:
                held = max(len(train) // 10, 1)
                pieces["test"].append(train[-held:])
                train = train[:-held]
            held = max(len(train) // 20, 1)
            pieces["train"].append(train[:-held])
            pieces["val"].append(train[-held:])
        splits = {}
        for name, tensors in pieces.items():
            labels = [torch.full((len(part),), number) for part, (_, number) in zip(tensors, members, strict=True)]
            # one class stays memory-mapped
            splits[name] = Split(tensors[0] if len(tensors) == 1 else torch.cat(tensors), torch.cat(labels))
        return splits

    def content(self) -> list[str]:
        return [f"{path.name} {md5_of(path)}" for path in self._paths()]

    def record(self) -> dict[str, Any]:
        test = "a folder of its own" if self.parts()[1] else "a tenth, held out"
        return {**super().record(), "resample": self.resample, "test": test}


class CelebAHQ(ImageFolders):
    """CelebA-HQ from ``celeba_hq/``, one folder of 30,000 square images (subfolders count), or ``train/`` and ``val/`` or
    ``test/`` in it. Where there is no folder for test, a fixed tenth is; of the rest a fixed twentieth is for validation.

    Args:
        size: height and width to which the images are made smaller.
        resample: box, as the mean over pixels, or lanczos.
        root: folder of all benchmarks; None for the environment variable NFDM_DATA, or else ``data``.
        verify: whether there must be 30,000 images.
        batch_size: samples per step and process.
        eval_batch_size: samples per step and process in validation, test and prediction.
        num_workers: loader processes.
        seed: of the order of the training data; the splits are fixed.
        flip: whether training images are mirrored left to right at random.

    Raises:
        DataError: images that are missing, unreadable, not square or too small.
    """

    source = "get the images of CelebA-HQ, as PNG or JPEG"

    def __init__(
        self,
        size: int = 256,
        resample: Resample = "box",
        root: str | None = None,
        verify: bool = True,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(
            "celeba_hq", size, resample, root, verify, None, batch_size, eval_batch_size, num_workers, seed, flip
        )

    def members(self) -> list[tuple[str, int]]:
        return [("", 0)]

    def published(self, part: str, member: str) -> int:
        train, test = self.parts()
        other = train if part == "test" else test
        return 30_000 - (0 if other is None else len(image_files(other)))

    def labels(self, split: str) -> Tensor | None:
        return None


class AFHQ(ImageFolders):
    """Animal faces from ``afhq/`` (v1) or ``afhq_v2/`` (v2): ``train/cat/``, ``train/dog/``, ``train/wild/``, and the same
    under ``val/`` or ``test/``, which are for test. A fixed twentieth of each class is for validation.

    Args:
        version: v1, the first release, or v2, resampled better and without some 2 % of the images.
        size: height and width to which the images are made smaller.
        resample: box, as the mean over pixels, or lanczos.
        root: folder of all benchmarks; None for the environment variable NFDM_DATA, or else ``data``.
        verify: whether the number of images must be as published.
        classes: cat, dog and wild, or some of them; None keeps all.
        batch_size: samples per step and process.
        eval_batch_size: samples per step and process in validation, test and prediction.
        num_workers: loader processes.
        seed: of the order of the training data; the splits are fixed.
        flip: whether training images are mirrored left to right at random.
        labels: whether batches carry the class of each sample, for a conditional model.

    Raises:
        DataError: images that are missing, unreadable, not square or too small.
    """

    class_names = ("cat", "dog", "wild")
    source = "get AFHQ by way of github.com/clovaai/stargan-v2"

    def __init__(
        self,
        version: AFHQVersion = "v1",
        size: int = 64,
        resample: Resample = "box",
        root: str | None = None,
        verify: bool = True,
        classes: list[str | int] | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        flip: bool = False,
        labels: bool = False,
    ) -> None:
        if version not in get_args(AFHQVersion):
            raise ConfigError(f"data.version={version}: there are {' and '.join(get_args(AFHQVersion))}")
        folder = "afhq" if version == "v1" else "afhq_v2"
        super().__init__(
            folder, size, resample, root, verify, classes, batch_size, eval_batch_size, num_workers, seed, flip, labels
        )
        self.version = version

    def members(self) -> list[tuple[str, int]]:
        numbers = range(len(self.class_names)) if self.kept is None else self.kept
        return [(self.class_names[number], number) for number in numbers]

    def published(self, part: str, member: str) -> int:
        sizes = _AFHQ_SIZES[str(self.version)][member]
        return sum(sizes) if part == "all" else sizes[part == "test"]


_AFHQ_SIZES = {
    "v1": {"cat": (5153, 500), "dog": (4739, 500), "wild": (4738, 500)},
    "v2": {"cat": (5065, 493), "dog": (4678, 491), "wild": (4593, 483)},
}

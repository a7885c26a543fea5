"""Data of a user's own: a folder of images, or an array file."""

import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nfdm_lightning.data.base import DataModule
from nfdm_lightning.errors import DataError

_MODES = {"1": "L", "L": "L", "LA": "L", "RGB": "RGB", "RGBA": "RGB", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Files(DataModule):
    """Reads images or vectors from ``path``, which is one of.

    * a folder of images (PNG, JPEG, WebP, BMP), searched recursively, all of one size and mode;
    * an ``.npy`` file with one array;
    * an ``.npz`` file with an array ``train`` (or exactly one array of any name) and, optionally, ``val`` and ``test``.

    Arrays are (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W). uint8 arrays are images of discrete levels; floats are
    continuous data, used as they are. Where ``val`` or ``test`` is missing, a fixed random part of the rest is held out.
    Pickled arrays are never opened.

    Args:
        path: folder or file.
        levels: number of levels of uint8 data, 0 .. levels - 1.
        held_out: share of the data for validation, and again for test, where the file has no such arrays.
        batch_size: samples per step and process.
        eval_batch_size: samples per step and process in validation, test and prediction.
        num_workers: loader processes.
        seed: of the order of the training data; the held-out part does not depend on it.
        flip: whether training images are mirrored left to right at random.

    Raises:
        DataError: nothing at ``path``, an unreadable file, mixed sizes or modes, values outside the levels, not finite.
    """

    def __init__(
        self,
        path: str,
        levels: int = 256,
        held_out: float = 0.1,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, flip)
        if not 0 < held_out < 0.5:
            raise DataError(f"held_out={held_out} must lie in (0, 0.5)")
        if not 2 <= levels <= 256:
            raise DataError(f"levels={levels} must lie in 2 .. 256")
        self.path, self.max_levels, self.held_out = Path(path).expanduser(), levels, held_out
        self._splits = self.arrays()  # the model needs the shape at once, and errors should come early

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._splits["train"].shape[1:])

    @property
    def levels(self) -> int | None:
        return self.max_levels if self._splits["train"].dtype == torch.uint8 else None

    @property
    def data_std(self) -> float:
        sample = self.normalise(self._splits["train"][:4096])
        return max(float(sample.std()), 1e-3)

    def arrays(self) -> dict[str, Tensor]:
        found = _read(self.path)
        splits = {name: self._check(name, array) for name, array in found.items()}
        kinds = {(tuple(array.shape[1:]), array.dtype) for array in splits.values()}
        if len(kinds) > 1:
            raise DataError(
                f"{self.path}: the arrays {', '.join(splits)} differ in shape or type: {sorted(map(str, kinds))}"
            )
        missing = [name for name in ("val", "test") if name not in splits]
        if missing:
            pool = splits["train"]
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
            part = int(len(pool) * self.held_out)
            if part < 1:
                raise DataError(
                    f"{self.path}: {len(pool)} samples are too few to hold out {self.held_out:.0%} for {', '.join(missing)}"
                )
            for name in missing:
                splits[name], order = pool[order[:part]], order[part:]
            splits["train"] = pool[order]
        return splits

    def _check(self, name: str, array: np.ndarray) -> Tensor:
        where = f"{self.path} [{name}]"
        if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
            raise DataError(f"{where}: type {array.dtype}; convert to uint8 (levels) or float (continuous)")
        if array.ndim not in (2, 3, 4) or 0 in array.shape:
            raise DataError(f"{where}: shape {array.shape}; expected (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W), N > 0")
        if array.dtype == np.uint8 and array.max() >= self.max_levels:
            raise DataError(f"{where}: value {array.max()} is not below levels={self.max_levels}; set --data.levels")
        if array.dtype != np.uint8:
            bad = ~np.isfinite(array).reshape(len(array), -1).all(1)
            if bad.any():
                raise DataError(f"{where}: {bad.sum()} samples have NaN or infinite values, first at index {bad.argmax()}")
            array = array.astype(np.float32)
        if array.ndim == 3:
            array = array[:, None]
        if array.ndim == 4 and array.shape[3] in (1, 3) and array.shape[1] not in (1, 3):
            array = array.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(array))


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.is_dir():
        return {"train": _read_folder(path)}
    if not path.is_file():
        raise DataError(f"{path} does not exist: set --data.path to a folder of images or an .npy or .npz file")
    if path.suffix not in (".npy", ".npz"):
        raise DataError(f"{path}: unknown kind of file; expected a folder of images, .npy or .npz")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"train": loaded}
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} cannot be read ({error}); write it with numpy.save or numpy.savez, without objects"
        ) from None
    if "train" in arrays:
        return {name: arrays[name] for name in ("train", "val", "test") if name in arrays}
    if len(arrays) == 1:
        return {"train": next(iter(arrays.values()))}
    raise DataError(f"{path} has the arrays {', '.join(arrays) or '(none)'}; name one of them 'train'")


def image_files(folder: Path) -> list[Path]:
    """Returns the images in a folder and those below it, in order.

    Raises:
        DataError: there are none.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return files


def open_image(file: Path | IO[bytes], name: str) -> Image.Image:
    """Returns an image in mode L or RGB.

    Args:
        file: where it is read from.
        name: what messages call it.

    Raises:
        DataError: it is unreadable, or has more than 8 bits per channel.
    """
    try:
        with Image.open(file) as image:
            mode = _MODES.get(image.mode, "")
            if not mode:
                raise DataError(
                    f"{name} has colour mode {image.mode}, not 8 bits per channel: convert it, or use an .npy file"
                )
            return image.convert(mode)
    except OSError as error:  # PIL's UnidentifiedImageError is one too
        raise DataError(f"{name} is not a readable image ({error}); repair or remove it") from None


def _read_folder(path: Path) -> np.ndarray:
    files = image_files(path)
    images: list[np.ndarray] = []
    first_mode = ""
    for file in files:
        image = open_image(file, str(file))
        pixels = np.asarray(image)
        if images and (pixels.shape[:2] != images[0].shape[:2]):
            height, width = images[0].shape[:2]
            raise DataError(
                f"{file} is {pixels.shape[0]}x{pixels.shape[1]}, but {files[0]} is {height}x{width}: resize all to one size"
            )
        if images and image.mode != first_mode:
            raise DataError(f"{file} is {image.mode}, but {files[0]} is {first_mode}: convert all to one colour mode")
        first_mode = first_mode or image.mode
        images.append(pixels)
    return np.stack(images)

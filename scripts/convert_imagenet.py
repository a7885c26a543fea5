r"""Writes ImageNet at 32x32 or 64x64 as the arrays that ImageNet32 and ImageNet64 read.

    # Chrabaszcz et al. 2017: the unpacked npz files of image-net.org
    .venv/bin/python scripts/convert_imagenet.py --version=downsampled --size=32 --out=data \
        --train Imagenet32_train_npz --val Imagenet32_val_npz

    # van den Oord et al. 2016: tar files, or folders, of PNG images
    .venv/bin/python scripts/convert_imagenet.py --version=pixelrnn --size=64 --out=data \
        --train train_64x64.tar --val valid_64x64.tar

Training images are put into a fixed random order, so that a validation split can be cut off their end. Pickled batches are
not read: take the npz files.
"""

import argparse
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, get_args

import numpy as np
import torch

from nfdm_lightning.data.files import IMAGE_SUFFIXES, open_image
from nfdm_lightning.data.imagenet import ORIGIN, ImageNetVersion
from nfdm_lightning.data.storage import md5_of, partial_file, write_json
from nfdm_lightning.errors import DataError

Batch = tuple[np.ndarray, np.ndarray | None]


def find_sources(paths: list[Path]) -> list[Path]:
    """Returns the npz files, tar files or images among some paths and below those that are folders, in order."""
    found = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [file for file in inside if file.suffix.lower() in (".npz", ".tar", *IMAGE_SUFFIXES)]
    if not found:
        raise DataError(f"{', '.join(map(str, paths))}: no npz files, tar files or images")
    if len({file.suffix == ".npz" for file in found}) > 1:
        raise DataError(f"{', '.join(map(str, paths))}: npz files and images together; give one kind")
    return found


def count(file: Path, size: int) -> int:
    """Returns the number of images in a file."""
    if file.suffix == ".tar":
        with tarfile.open(file) as tar:
            return sum(_is_image(member) for member in tar)
    return len(_read_npz(file, size)[0]) if file.suffix == ".npz" else 1


def batches(file: Path, size: int) -> Iterator[Batch]:
    """Yields the images of a file, (B, 3, size, size) uint8, and their labels, if it has any."""
    if file.suffix == ".npz":
        yield _read_npz(file, size)
    elif file.suffix == ".tar":
        with tarfile.open(file) as tar:
            for member in tar:
                if _is_image(member):
                    content = tar.extractfile(member)
                    assert content is not None
                    yield _pixels(content, f"{file}:{member.name}", size), None
    else:
        yield _pixels(file, str(file), size), None


def _is_image(member: tarfile.TarInfo) -> bool:
    return member.isfile() and Path(member.name).suffix.lower() in IMAGE_SUFFIXES


def _pixels(file: Path | IO[bytes], name: str, size: int) -> np.ndarray:
    pixels = np.asarray(open_image(file, name).convert("RGB"))
    if pixels.shape != (size, size, 3):
        raise DataError(f"{name} is {pixels.shape[0]}x{pixels.shape[1]}, not {size}x{size}")
    return pixels.transpose(2, 0, 1)[None]


def _read_npz(file: Path, size: int) -> Batch:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            data, labels = arrays["data"], arrays["labels"]
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} is no batch of downsampled ImageNet, with arrays data and labels ({error})") from None
    if data.dtype != np.uint8 or data.shape != (len(labels), 3 * size * size):
        raise DataError(f"{file}: data is {data.dtype} of shape {data.shape}, not uint8 ({len(labels)}, {3 * size * size})")
    return data.reshape(-1, 3, size, size), labels.astype(np.int64).reshape(-1) - 1  # the files count from 1


def convert(paths: list[Path], size: int, target: Path, mixed: bool) -> dict[str, object]:
    """Writes the images of some sources to ``target``, and their labels, if they have any, to ``*_labels.npy``.

    Returns:
        The number of images, the names of the sources and the MD5 of the array, for the note of the origin.
    """
    files = find_sources(paths)
    numbers = [count(file, size) for file in files]
    total = sum(numbers)
    if not total:
        raise DataError(f"{', '.join(map(str, paths))}: no images")
    places = torch.randperm(total, generator=torch.Generator().manual_seed(0)).numpy() if mixed else np.arange(total)
    labels = np.full(total, -1, np.int64)
    done = 0
    with partial_file(target) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (total, 3, size, size)}
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
        file.truncate(begin + total * 3 * size**2)
        file.flush()
        array = np.memmap(file, np.uint8, "r+", begin, (total, 3, size, size))
        for source in files:
            for images, classes in batches(source, size):
                where = places[done : done + len(images)]
                array[where] = images
                if classes is not None:
                    labels[where] = classes
                if done // 100_000 != (done + len(images)) // 100_000:
                    print(f"{target}: {done + len(images)} of {total}", file=sys.stderr, flush=True)
                done += len(images)
        array.flush()
        del array
    if (labels >= 0).all():
        with partial_file(target.with_name(f"{target.stem}_labels.npy")) as file:
            np.save(file, labels, allow_pickle=False)
    names = sorted({path.name for path in paths})
    return {"images": total, "sources": names, "md5": md5_of(target)}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", required=True, choices=get_args(ImageNetVersion))
    parser.add_argument("--size", required=True, type=int, choices=(32, 64))
    parser.add_argument("--train", required=True, type=Path, nargs="+", help="npz or tar files, images, or folders of these")
    parser.add_argument("--val", required=True, type=Path, nargs="+", help="the same for the official validation set")
    parser.add_argument("--out", required=True, type=Path, help="the root folder of all benchmarks")
    options = parser.parse_args(arguments)
    folder = options.out / f"imagenet{options.size}_{options.version}"
    try:
        parts = {
            "train": convert(options.train, options.size, folder / "train.npy", mixed=True),
            "val": convert(options.val, options.size, folder / "val.npy", mixed=False),
        }
        write_json(folder / ORIGIN, {"version": options.version, **parts})
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {parts['train']['images']} training, {parts['val']['images']} validation images")
    return 0


if __name__ == "__main__":
    sys.exit(main())

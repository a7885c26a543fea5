"""Where benchmark data lie, how they get there, and whether they are what they should be."""

import hashlib
import http.client
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib import request

import numpy as np
import torch
from torch import Tensor

from nfdm_lightning.errors import DataError

ROOT_VARIABLE = "NFDM_DATA"
_REMEMBERED = ".md5.json"
_CHUNK = 1 << 20


def data_root(root: str | None) -> Path:
    """Returns the folder of all benchmarks: ``root``, else the environment variable NFDM_DATA, else ``data`` here."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or "data").expanduser()


@contextmanager
def partial_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a ``.partial`` file beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a name of its own: several machines may share the folder
        descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise DataError(
            f"{path.parent} cannot be written ({error.strerror}): set data.root or {ROOT_VARIABLE} to another folder"
        ) from None
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file at once, never half of it."""
    with partial_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Returns a dictionary from a JSON file; an empty one if it is missing or no such file."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def md5_of(path: Path) -> str:
    """Returns the MD5 of a file, computed once and remembered beside it for as long as its size and time stay the same."""
    remembered, stat = read_json(path.parent / _REMEMBERED), path.stat()
    found = remembered.get(path.name)
    if isinstance(found, dict) and (found.get("size"), found.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns):
        return str(found.get("md5"))
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    entry = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "md5": digest.hexdigest()}
    with suppress(DataError, OSError):  # in a folder of others it is computed again next time
        write_json(path.parent / _REMEMBERED, {**read_json(path.parent / _REMEMBERED), path.name: entry})
    return digest.hexdigest()


def check_md5(path: Path, md5: str) -> None:
    """Compares a file with what it should be.

    Raises:
        DataError: it is something else.
    """
    if (found := md5_of(path)) != md5:
        raise DataError(
            f"{path} is damaged or another file: its MD5 is {found}, not {md5}; delete it and start again, or set "
            "data.verify=false for data of your own in this format"
        )


def download(urls: Sequence[str], path: Path, md5: str, otherwise: str = "") -> None:
    """Downloads a file from the first address that gives it.

    Args:
        urls: addresses of the same file, https only.
        path: where it goes.
        md5: what it must be.
        otherwise: what else would help, for the message.

    Raises:
        DataError: no address gives it, as without a network, or what comes is something else.
    """
    for url in urls:
        if not url.startswith("https://"):
            raise DataError(f"{url} is not https: download it yourself and put it at {path}")
    reasons = []
    for url in urls:
        try:
            _fetch(url, path, md5)
        except (OSError, http.client.HTTPException) as error:  # urllib's and ssl's errors and time-outs are OSErrors
            reasons.append(f"{url}: {error}")
        else:
            return
    raise DataError(
        f"{path} is missing and cannot be downloaded ({'; '.join(reasons)}): get {urls[0]} on a machine with a network and "
        f"put it there, or set data.root or {ROOT_VARIABLE} to the folder that has it{otherwise}"
    )


def _fetch(url: str, path: Path, md5: str) -> None:
    digest, done, shown = hashlib.md5(usedforsecurity=False), 0, -1
    with request.urlopen(url, timeout=60) as response, partial_file(path) as file:
        if not response.geturl().startswith("https://"):
            raise OSError(f"redirected to {response.geturl()}, which is not https")
        total = int(response.headers.get("Content-Length") or 0)
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            if total and (percent := 10 * (10 * done // total)) > shown:
                shown = percent
                print(f"{url}: {percent} % of {total / 1e6:.1f} MB", file=sys.stderr, flush=True)
        if done < total:
            raise OSError(f"{done} of {total} bytes came")
        if digest.hexdigest() != md5:
            raise OSError(f"what came has MD5 {digest.hexdigest()}, not {md5}")


def load_array(path: Path, mapped: bool = False) -> np.ndarray:
    """Returns the array of an ``.npy`` file, in memory or memory-mapped.

    Raises:
        DataError: the file is damaged, or holds objects.
    """
    try:
        # copy-on-write, as torch wants arrays that can be written; the file never changes
        array = np.load(path, mmap_mode="c" if mapped else None, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}): make it again") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is no single array: make it again")
    return array


def mapped_images(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Returns the images of an ``.npy`` file, (N, *shape) uint8, memory-mapped.

    Raises:
        DataError: the file is damaged, or has other images.
    """
    array = load_array(path, mapped=True)
    if array.dtype != np.uint8 or array.shape[1:] != shape or not len(array):
        raise DataError(
            f"{path} holds {array.dtype} of shape {array.shape}, not uint8 (N, {', '.join(map(str, shape))}): make it again"
        )
    return torch.from_numpy(array)

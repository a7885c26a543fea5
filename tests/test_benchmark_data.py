"""The benchmarks on stand-ins in their own formats, their faults, mirrored training images; the real files if at hand."""

import gzip
import importlib.util
import io
import json
import os
import tarfile
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from urllib import error, request

import numpy as np
import pytest
import torch
from PIL import Image

from nfdm_lightning import data as datasets
from nfdm_lightning.data import (
    AFHQ,
    CIFAR10,
    MNIST,
    Blob,
    CelebAHQ,
    DataModule,
    Digits,
    Files,
    ImageNet32,
    Pairs,
    Toy2D,
    storage,
)
from nfdm_lightning.data.benchmark import chosen_classes
from nfdm_lightning.data.mnist import FashionMNIST, read_idx
from nfdm_lightning.errors import ConfigError, DataError
from standins import (
    STANDINS,
    idx_bytes,
    write_afhq,
    write_celeba_hq,
    write_cifar10,
    write_images,
    write_mnist,
    write_standin,
)

FLOAT32 = True

SETTINGS = {
    "MNIST": {},
    "FashionMNIST": {},
    "CIFAR10": {},
    "ImageNet32": {"version": "pixelrnn"},
    "ImageNet64": {"version": "downsampled"},
    "CelebAHQ": {"size": 16},
    "AFHQ": {"size": 16},
}
SIZES = {
    "MNIST": {"train": 220, "val": 20, "test": 20},
    "FashionMNIST": {"train": 220, "val": 20, "test": 20},
    "CIFAR10": {"train": 360, "val": 40, "test": 80},
    "ImageNet32": {"train": 54, "val": 6, "test": 12},
    "ImageNet64": {"train": 54, "val": 6, "test": 12},
    "CelebAHQ": {"train": 35, "val": 1, "test": 4},
    "AFHQ": {"train": 69, "val": 3, "test": 12},
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **settings):
        raise error.URLError("no network in tests")

    monkeypatch.setattr(request, "urlopen", refuse)


@pytest.fixture(scope="module")
def standins(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("standins")
    for name in STANDINS:
        write_standin(name, root)
    return root


def benchmark(name: str, root: Path, **settings) -> DataModule:
    return getattr(datasets, name)(root=str(root), verify=False, **{**SETTINGS[name], **settings})


@pytest.mark.parametrize("name", STANDINS)
def test_every_benchmark_reads_its_stand_in(standins, name):
    data = benchmark(name, standins, batch_size=16, flip=True)
    assert data.shape == data.raw("train").shape[1:]
    assert data.sizes() == SIZES[name]
    for split in ("train", "val", "test"):
        assert data.raw(split).dtype == torch.uint8
        labels = data.labels(split)
        if name not in ("CelebAHQ", "ImageNet32"):
            assert (labels.dtype, labels.shape) == (torch.int64, (len(data.raw(split)),))
        else:
            assert labels is None
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch.shape == (16, *data.shape)
    assert -1 <= batch.min() < batch.max() <= 1
    record = data.record()
    assert json.loads(json.dumps(record)) == record
    assert record["class"] == name
    assert (record["sizes"], record["flip"], record["verified"]) == (SIZES[name], True, False)
    again = benchmark(name, standins)
    assert again.checksum == data.checksum  # flips and batch sizes do not count
    assert again.record()["version"] == SETTINGS[name].get("version", "v1" if name == "AFHQ" else None)


def test_checksums_tell_data_apart(standins):
    classes = [None, ["cat"], ["dog"], ["cat", "dog"]]
    data: list[DataModule] = [benchmark("CIFAR10", standins, classes=kept) for kept in classes]
    data += [benchmark("CIFAR10", standins, protocol=protocol) for protocol in ("full", "held_out")]
    data += [benchmark("ImageNet32", standins, version=version) for version in ("pixelrnn", "downsampled")]
    data += [benchmark("AFHQ", standins, version=version) for version in ("v1", "v2")]
    data += [benchmark("AFHQ", standins, classes=["cat"])]
    data += [Digits(), Digits(digit=3), Toy2D(train_size=50, eval_size=10), Toy2D(train_size=50, eval_size=10, seed=1)]
    data += [Pairs(Digits(digit=3), Digits(digit=8)), Pairs(Digits(digit=8), Digits(digit=3))]
    assert len({one.checksum for one in data}) == len(data)
    assert Digits().checksum == Digits(seed=3, batch_size=7).checksum


def test_root_is_argument_variable_or_data(monkeypatch, tmp_path):
    monkeypatch.delenv("NFDM_DATA", raising=False)
    assert storage.data_root(None) == Path("data")
    monkeypatch.setenv("NFDM_DATA", str(tmp_path))
    assert storage.data_root(None) == tmp_path
    assert storage.data_root("elsewhere") == Path("elsewhere")


def test_mnist_splits(standins):
    data = benchmark("MNIST", standins)
    content = (standins / "mnist" / "train-images-idx3-ubyte").read_bytes()
    images = np.frombuffer(content, np.uint8)[16:].reshape(240, 1, 28, 28)
    assert np.array_equal(data.raw("train").numpy(), images[:220])
    assert np.array_equal(data.raw("val").numpy(), images[220:])
    assert data.labels("train")[:12].tolist() == [*range(10), 0, 1]
    sevens = benchmark("MNIST", standins, classes=[7])
    assert torch.equal(sevens.raw("test"), data.raw("test")[[7, 17]])
    assert sevens.labels("test").tolist() == [7, 7]
    assert sevens.record()["classes"] == ["7"]


def test_mnist_in_the_folder_of_torchvision(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST").mkdir()
    (tmp_path / "mnist").rename(tmp_path / "MNIST" / "raw")
    assert len(benchmark("MNIST", tmp_path).raw("train")) == 220


def identities(images: torch.Tensor) -> list[tuple[int, int]]:
    return [tuple(image.flatten()[:2].tolist()) for image in images]


def test_cifar_protocols(standins):
    """The first two pixels of a stand-in say which image it is."""
    parts = {p: benchmark("CIFAR10", standins, protocol=p) for p in ("official", "full", "held_out")}
    images = {p: {s: identities(data.raw(s)) for s in ("train", "val", "test")} for p, data in parts.items()}
    everything = {(batch, number) for batch in range(1, 6) for number in range(80)}
    official = images["official"]
    assert {*official["train"], *official["val"]} == everything
    assert len(official["train"]) + len(official["val"]) == 400
    assert len({batch for batch, _ in official["val"]}) == 5  # not the end of the last file
    assert set(images["full"]["train"]) == everything
    assert images["full"]["val"] == official["val"]
    assert images["full"]["test"] == official["test"]
    assert images["held_out"] == {"train": official["train"], "val": official["val"], "test": official["val"]}
    records = {p: data.record() for p, data in parts.items()}
    assert {p: record["protocol"] for p, record in records.items()} == {p: p for p in parts}
    assert records["held_out"]["test"] == "the validation images"
    assert records["full"]["validation"] == "training images"


def test_cifar_channels_and_classes(standins):
    data = benchmark("CIFAR10", standins)
    content = np.fromfile(standins / "cifar-10-batches-bin" / "test_batch.bin", np.uint8).reshape(80, 3073)
    image = data.raw("test")[3]
    assert image[1, 0, 2] == content[3, 1 + 1024 + 2]  # the third green pixel
    assert image[2, 1, 0] == content[3, 1 + 2048 + 32]  # the first blue one of the second row
    pets = benchmark("CIFAR10", standins, classes=["Dog", 3])
    assert pets.record()["classes"] == ["cat", "dog"]
    assert pets.labels("test")[:4].tolist() == [3, 5, 3, 5]
    wanted = {
        identity for identity, label in zip(identities(data.raw("val")), data.labels("val"), strict=True) if label in (3, 5)
    }
    assert set(identities(pets.raw("val"))) == wanted  # the same split: none of them is trained on


@pytest.mark.parametrize(
    ("classes", "message"),
    [(["unicorn"], "no class 'unicorn'; there are airplane"), ([10], "no class 10"), ([-1], "no class -1"), ([], "empty")],
)
def test_unknown_classes_are_refused(classes, message):
    with pytest.raises(ConfigError, match=message):
        CIFAR10(classes=classes)


def test_classes_by_name_or_number():
    assert chosen_classes(None, ["a", "b"]) is None
    assert chosen_classes(["b", "0", 1], ["a", "b"]) == [0, 1]


def test_odd_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="version=2012: there are pixelrnn and downsampled"):
        ImageNet32(version="2012")
    with pytest.raises(ConfigError, match="version=v3"):
        AFHQ(version="v3")
    with pytest.raises(ConfigError, match="protocol=all"):
        CIFAR10(protocol="all")
    with pytest.raises(ConfigError, match="resample=nearest"):
        CelebAHQ(resample="nearest")
    with pytest.raises(ConfigError, match="size=0"):
        AFHQ(size=0)
    with pytest.raises(TypeError, match="version"):
        ImageNet32()


# ---------------------------------------------------------------------------------------------- files and their faults


def test_missing_files_without_a_network(tmp_path):
    for data, name in ((MNIST, "train-images-idx3-ubyte.gz"), (FashionMNIST, "train-images-idx3-ubyte.gz")):
        with pytest.raises(
            DataError, match=rf"{name} is missing and cannot be downloaded .*no network.*get https://.*NFDM_DATA"
        ):
            data(root=str(tmp_path)).prepare_data()
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz is missing and cannot be downloaded") as caught:
        CIFAR10(root=str(tmp_path)).raw("train")
    assert "held_out" not in str(caught.value)
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"data.protocol=held_out needs no test file"):
        CIFAR10(root=str(tmp_path)).raw("train")
    with pytest.raises(
        DataError, match=r"imagenet32_pixelrnn/train.npy is missing: get train_32x32.tar .*convert_imagenet.py"
    ):
        ImageNet32(version="pixelrnn", root=str(tmp_path)).prepare_data()
    with pytest.raises(DataError, match=r"image-net.org, which needs an account.*--version=downsampled --out="):
        ImageNet32(version="downsampled", root=str(tmp_path)).prepare_data()
    for data in (AFHQ, CelebAHQ):
        with pytest.raises(DataError, match="is missing: get"):
            data(root=str(tmp_path)).prepare_data()
    assert not list(tmp_path.rglob("*.partial"))


class Response(io.BytesIO):
    """What urlopen gives."""

    def __init__(self, content: bytes, address: str, announced: int | None = None) -> None:
        super().__init__(content)
        self.address, self.headers = address, {"Content-Length": str(len(content) if announced is None else announced)}

    def geturl(self) -> str:
        return self.address


def test_download_goes_on_to_the_next_address_and_checks_what_comes(tmp_path, monkeypatch, capsys):
    content, asked = b"some data", []
    md5 = "1e50210a0202497fb79bc38b6ade6c34"

    def urlopen(url, timeout):
        asked.append(url)
        if "first" in url:
            raise error.HTTPError(url, 404, "Not Found", None, None)
        if "wrong" in url:
            return Response(b"other", url)
        if "short" in url:
            return Response(content, url, announced=100)
        return Response(content, "http://plain" if "redirected" in url else url)

    monkeypatch.setattr(request, "urlopen", urlopen)
    path = tmp_path / "new" / "file.bin"
    storage.download(["https://first", "https://wrong", "https://short", "https://redirected", "https://good"], path, md5)
    assert (path.read_bytes(), len(asked)) == (content, 5)
    assert "https://good: 100 %" in capsys.readouterr().err
    path.unlink()
    for kind, reason in (("wrong", "what came has MD5"), ("short", "9 of 100 bytes"), ("redirected", "not https")):
        with pytest.raises(DataError, match=reason):
            storage.download([f"https://{kind}"], path, md5)
    with pytest.raises(DataError, match="http://plain is not https"):
        storage.download(["http://plain"], path, md5)
    assert list(path.parent.iterdir()) == []  # no part of a file stays


def test_cifar_archive_is_fetched_and_unpacked(tmp_path, monkeypatch):
    write_cifar10(tmp_path / "there")
    packed = tmp_path / "there" / "cifar-10-binary.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(tmp_path / "there" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    content = packed.read_bytes()
    monkeypatch.setattr(request, "urlopen", lambda url, timeout: Response(content, url))
    monkeypatch.setattr("nfdm_lightning.data.cifar._ARCHIVE_MD5", storage.md5_of(packed))
    data = CIFAR10(root=str(tmp_path / "here"), verify=False)
    data.prepare_data()
    there = {path.name for path in (tmp_path / "here").iterdir()}
    assert there <= {"cifar-10-batches-bin", packed.name, ".md5.json"}
    expected = CIFAR10(root=str(tmp_path / "there"), verify=False)
    assert torch.equal(data.raw("test"), expected.raw("test"))
    by_hand = tmp_path / "by_hand"  # an archive that somebody put there is used and kept
    by_hand.mkdir()
    (by_hand / packed.name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be unpacked"):
        CIFAR10(root=str(by_hand), verify=False).prepare_data()
    (by_hand / packed.name).write_bytes(content)
    assert len(CIFAR10(root=str(by_hand), verify=False).raw("train")) == 360
    assert (by_hand / packed.name).is_file()


def test_md5_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    first = storage.md5_of(path)
    assert first == "900150983cd24fb0d6963f7d28e17f72"  # that of RFC 1321
    remembered = json.loads((tmp_path / ".md5.json").read_text())
    remembered["a.bin"]["md5"] = "from memory"
    (tmp_path / ".md5.json").write_text(json.dumps(remembered))
    assert storage.md5_of(path) == "from memory"
    os.utime(path, ns=(1, 1))
    assert storage.md5_of(path) == first
    path.write_bytes(b"abcd")
    assert storage.md5_of(path) != first
    (tmp_path / ".md5.json").write_text("[broken")
    os.utime(path, ns=(2, 2))
    with pytest.raises(DataError, match=r"a.bin is damaged or another file: its MD5 is .*, not 123; .*data.verify=false"):
        storage.check_md5(path, "123")
    monkeypatch.setattr(storage.tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    os.utime(path, ns=(3, 3))
    assert storage.md5_of(path) == "e2fc714c4727ee9395f324cd2e7f331f"  # of others' folders nothing is remembered
    with pytest.raises(DataError, match=r"cannot be written \(denied\): set data.root"):
        storage.write_json(path, {})


def test_files_that_are_not_the_published_ones_are_refused(standins):
    with pytest.raises(DataError, match=r"data_batch_1.bin is damaged or another file"):
        CIFAR10(root=str(standins)).raw("train")
    with pytest.raises(DataError, match="train-images-idx3-ubyte is damaged or another file"):
        MNIST(root=str(standins)).raw("train")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is damaged or another file"):
        FashionMNIST(root=str(standins)).raw("train")
    with pytest.raises(DataError, match=r"train.npy has 60 images, not the 1281149"):
        ImageNet32(version="pixelrnn", root=str(standins)).raw("train")
    with pytest.raises(DataError, match="afhq/train/cat has 24 images, not 5153"):
        AFHQ(root=str(standins)).raw("train")
    with pytest.raises(DataError, match="celeba_hq has 40 images, not 30000"):
        CelebAHQ(root=str(standins)).raw("train")


def test_imagenet_of_the_other_version_is_refused(tmp_path):
    write_standin("ImageNet32", tmp_path)
    (tmp_path / "imagenet32_pixelrnn" / "origin.json").write_text('{"version": "downsampled"}')
    with pytest.raises(DataError, match=r"imagenet32_pixelrnn is downsampled, not pixelrnn, by its origin.json"):
        ImageNet32(version="pixelrnn", root=str(tmp_path)).raw("train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with nothing"),
        (b"\x00\x00\x0d\x03" + bytes(12), "begins with 00000d03, not 00000803"),
        (b"\x00\x00\x08\x01" + bytes(12), "begins with 00000801"),
        (b"\x00\x00\x08\x03" + bytes(5), "ends inside its header"),
        (idx_bytes(np.zeros((3, 2, 2), np.uint8))[:-1], "should hold 3 x 2 x 2 bytes, but has 11"),
        (idx_bytes(np.zeros((3, 2, 2), np.uint8)) + b"x", "but has 13"),
    ],
)
def test_faulty_idx_files(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "a", 3)
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "a.gz", 3)


def test_faulty_gzip_files(tmp_path):
    packed = gzip.compress(idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 2, 2)))
    for content in (packed[:-9], b"not gzip", packed[:20] + bytes([packed[20] ^ 255]) + packed[21:]):
        (tmp_path / "a.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"a.gz cannot be read"):
            read_idx(tmp_path / "a.gz", 3)


def test_faulty_mnist(tmp_path):
    write_mnist(tmp_path)
    folder = tmp_path / "mnist"
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(19, np.uint8)))
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte has 20 images, but 19 labels"):
        benchmark("MNIST", tmp_path).raw("train")
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((20, 27, 28), np.uint8)))
    with pytest.raises(DataError, match="27x28 pixels, not 28x28"):
        benchmark("MNIST", tmp_path).raw("train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "has 245839 bytes, no multiple of 3073"),
        (lambda content: b"", "has 0 bytes"),
        (lambda content: b"\x0b" + content[1:], "has a label 11"),
    ],
)
def test_faulty_cifar(tmp_path, change, message):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"data_batch_4.bin {message}"):
        benchmark("CIFAR10", tmp_path).raw("train")


def test_faulty_imagenet(tmp_path):
    write_standin("ImageNet32", tmp_path)
    path = tmp_path / "imagenet32_downsampled" / "train.npy"
    good = path.read_bytes()

    def message() -> str:
        with pytest.raises(DataError) as caught:
            benchmark("ImageNet32", tmp_path, version="downsampled").raw("train")
        return str(caught.value)

    path.write_bytes(good[:-1])
    assert "train.npy cannot be read" in message()
    np.save(path, np.zeros((5, 32, 32, 3), np.uint8))
    assert "holds uint8 of shape (5, 32, 32, 3), not uint8 (N, 3, 32, 32)" in message()
    np.save(path, np.array([{}], object), allow_pickle=True)
    assert "train.npy cannot be read" in message()
    path.write_bytes(good)
    np.save(path.with_name("train_labels.npy"), np.zeros(7))
    assert "train_labels.npy has shape (7,) for 60 images" in message()


def test_a_class_without_images(tmp_path):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:3073])
    with pytest.raises(DataError, match=r"the test split holds no images of the classes \['dog'\]"):
        benchmark("CIFAR10", tmp_path, classes=["dog"]).raw("train")


# ------------------------------------------------------------------------------------------------------ folders of images


def test_resizing_is_the_mean_over_boxes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    folder = tmp_path / "celeba_hq"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    box = benchmark("CelebAHQ", tmp_path, size=4).raw("train")[0]
    mean = pixels.reshape(4, 4, 4, 4, 3).astype(float).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(box.numpy() - mean).max() <= 1  # rounded twice
    assert np.abs(box.numpy() - mean).mean() < 0.5
    lanczos = benchmark("CelebAHQ", tmp_path, size=4, resample="lanczos")
    assert not torch.equal(lanczos.raw("train")[0], box)
    assert lanczos.record()["resample"] == "lanczos"
    whole = benchmark("CelebAHQ", tmp_path, size=16).raw("train")[0]
    assert np.array_equal(whole.numpy(), pixels.transpose(2, 0, 1))


def test_folders_are_resized_once_until_they_change(tmp_path, monkeypatch):
    write_celeba_hq(tmp_path)
    train = benchmark("CelebAHQ", tmp_path).raw("train").clone()
    cache = tmp_path / "celeba_hq_16_box" / "all.npy"
    time = cache.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("nfdm_lightning.data.folders.open_image", lambda *_: pytest.fail("resized again"))
        assert torch.equal(benchmark("CelebAHQ", tmp_path).raw("train"), train)
    assert cache.stat().st_mtime_ns == time
    os.utime(tmp_path / "celeba_hq" / "000003.png", ns=(1, 1))
    assert torch.equal(benchmark("CelebAHQ", tmp_path).raw("train"), train)
    assert cache.stat().st_mtime_ns > time
    write_images(tmp_path / "celeba_hq", 50, 32)
    assert len(benchmark("CelebAHQ", tmp_path).raw("train")) == 43
    content = cache.read_bytes()
    benchmark("CelebAHQ", tmp_path).raw("train").add_(1)  # a change in memory does not reach the file
    assert cache.read_bytes() == content


def test_splits_of_folders_hold_every_image_once(standins):
    data = benchmark("CelebAHQ", standins)
    reds = [sorted(data.raw(split)[:, 0, 0, 0].tolist()) for split in ("train", "val", "test")]
    assert sorted(chain(*reds)) == list(range(40))
    assert reds[2] != list(range(36, 40))  # not the end of the listing
    cats, everything = benchmark("AFHQ", standins, classes=["cat"]), benchmark("AFHQ", standins)
    assert cats.sizes() == {"train": 23, "val": 1, "test": 4}
    assert cats.labels("train").tolist() == [0] * 23
    assert sorted(cats.raw("test")[:, 0, 0, 0].tolist()) == [30, 31, 32, 33]
    for split in ("train", "val", "test"):
        assert torch.equal(everything.raw(split)[everything.labels(split) == 0], cats.raw(split))
        assert torch.equal(everything.raw(split)[:, 0, 0, 0] // 50, everything.labels(split).byte())


def test_folders_without_a_test_part(tmp_path):
    write_afhq(tmp_path)
    for member in ("cat", "dog", "wild"):  # classes right in the folder
        (tmp_path / "afhq" / "train" / member).rename(tmp_path / "afhq" / member)
    for path in (tmp_path / "afhq" / "val").rglob("*.png"):
        path.unlink()
    for folder in (*(tmp_path / "afhq" / "val").iterdir(), tmp_path / "afhq" / "val", tmp_path / "afhq" / "train"):
        folder.rmdir()
    data = benchmark("AFHQ", tmp_path)
    assert data.sizes() == {"train": 63, "val": 3, "test": 6}
    assert data.record()["test"] == "a tenth, held out"
    with pytest.raises(DataError, match="afhq/cat has 24 images, not 5653"):
        AFHQ(root=str(tmp_path), size=16).raw("train")


def test_faulty_folders(tmp_path):
    folder = tmp_path / "celeba_hq"
    folder.mkdir()

    def message(name: str = "CelebAHQ", **settings) -> str:
        with pytest.raises(DataError) as caught:
            benchmark(name, tmp_path, **settings).raw("train")
        return str(caught.value)

    assert "celeba_hq holds no images" in message()
    write_images(folder, 4, 16)
    assert "000" in message(size=32)
    assert "is 16x16: squares of at least 32x32 are expected" in message(size=32)
    (folder / "broken.png").write_bytes((folder / "000000.png").read_bytes()[:30])
    assert "broken.png is not a readable image" in message()
    Image.new("RGB", (20, 16)).save(folder / "broken.png")
    assert "broken.png is 16x20: squares" in message()
    assert not list(tmp_path.rglob("*.partial"))
    write_afhq(tmp_path)
    for path in (tmp_path / "afhq" / "val" / "dog").iterdir():
        path.unlink()
    assert "val/dog holds no images" in message("AFHQ")
    (tmp_path / "afhq" / "val" / "dog").rmdir()
    assert "val/dog is missing" in message("AFHQ")


# ------------------------------------------------------------------------------------------------- conversion of ImageNet


def converter():
    path = Path(__file__).parent.parent / "scripts" / "convert_imagenet.py"
    spec = importlib.util.spec_from_file_location("convert_imagenet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def write_batches(folder: Path) -> np.ndarray:
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(30)
    for i in range(3):
        part = slice(10 * i, 10 * i + 10)
        np.savez(
            folder / f"train_data_batch_{i + 1}.npz",
            data=images[part].reshape(10, -1),
            labels=np.arange(1, 31)[part],
            mean=np.zeros(3072),
        )
    np.savez(folder / "val_data.npz", data=images[:5].reshape(5, -1), labels=np.arange(1, 6))
    return images


def test_conversion_of_npz_batches(tmp_path, capsys):
    images = write_batches(tmp_path / "npz")
    train = [str(tmp_path / "npz" / f"train_data_batch_{i}.npz") for i in (1, 2, 3)]
    arguments = ["--version=downsampled", "--size=32", f"--out={tmp_path}", "--train", *train, "--val"]
    assert converter()([*arguments, str(tmp_path / "npz" / "val_data.npz")]) == 0
    assert "30 training, 5 validation" in capsys.readouterr().out
    data = benchmark("ImageNet32", tmp_path, version="downsampled")
    kept = torch.cat([data.raw("train"), data.raw("val")])
    numbers = kept[:, 0, 0, 0].tolist()
    assert sorted(numbers) == list(range(30))
    assert numbers != sorted(numbers)
    assert np.array_equal(kept.numpy(), images[numbers])
    assert torch.cat([data.labels("train"), data.labels("val")]).tolist() == numbers  # counted from 0
    assert np.array_equal(data.raw("test").numpy(), images[:5])
    origin = data.record()["origin"]
    assert origin["version"] == "downsampled"
    assert origin["train"]["md5"] == storage.md5_of(tmp_path / "imagenet32_downsampled" / "train.npy")
    with pytest.raises(DataError, match=r"train.npy has 30 images, not the 1281167 of downsampled"):
        ImageNet32(version="downsampled", root=str(tmp_path)).raw("train")


def test_conversion_of_png_images(tmp_path):
    for name, number in (("train", 20), ("valid", 6)):
        write_images(tmp_path / name, number, 64)
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(tmp_path / name, f"{name}_64x64")
    arrays = []
    for kind in ("", ".tar"):
        paths = ["--train", f"{tmp_path}/train{kind}", "--val", f"{tmp_path}/valid{kind}"]
        assert converter()(["--version=pixelrnn", "--size=64", f"--out={tmp_path}/out{kind}", *paths]) == 0
        data = benchmark("ImageNet64", tmp_path / f"out{kind}", version="pixelrnn")
        assert data.labels("train") is None
        arrays.append((torch.cat([data.raw("train"), data.raw("val")]), data.raw("test")))
    for train, test in arrays:
        assert sorted(train[:, 0, 5, 5].tolist()) == list(range(20))
        assert torch.equal(train[:, 2, 7, 7], 255 - train[:, 0, 0, 0])
        assert sorted(test[:, 1, 0, 0].tolist()) == [0, 2, 4, 6, 8, 10]


def test_conversion_refuses_what_is_none(tmp_path, capsys):
    write_batches(tmp_path / "npz")
    write_images(tmp_path / "small", 3, 16)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    np.savez(tmp_path / "mixed" / "a.npz", data=1)
    write_images(tmp_path / "mixed", 1, 32)
    np.savez(tmp_path / "pickled.npz", data=np.array([{}], object), labels=[1])
    np.savez(tmp_path / "floats.npz", data=np.zeros((2, 3072)), labels=[1, 2])
    cases = {
        "nowhere": "does not exist",
        "empty": "no npz files, tar files or images",
        "mixed": "npz files and images together",
        "mixed/a.npz": "no batch of downsampled ImageNet",
        "pickled.npz": "no batch of downsampled ImageNet",
        "floats.npz": "data is float64 of shape (2, 3072), not uint8 (2, 3072)",
        "small": "000000.png is 16x16, not 32x32",
    }
    for name, message in cases.items():
        train, val = str(tmp_path / name), str(tmp_path / "npz" / "val_data.npz")
        arguments = ["--version=downsampled", "--size=32", f"--out={tmp_path}/out", "--train", train, "--val", val]
        assert converter()(arguments) == 1
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.np*"))


# --------------------------------------------------------------------------------------------------------------- mirroring


class Arrows(DataModule):
    """Images of 1x1x2 pixels, [2 i, 2 i + 1]: mirrored ones begin with the odd number."""

    def __init__(self, number: int = 22, first: int = 0, **settings) -> None:
        super().__init__(**settings)
        self.number, self.first = number, first

    @property
    def shape(self):
        return (1, 1, 2)

    @property
    def levels(self):
        return 256

    def arrays(self):
        images = (2 * self.first + torch.arange(2 * self.number)).byte().reshape(-1, 1, 1, 2)
        return {"train": images, "val": images.clone(), "test": images.clone()}


def epoch(loader) -> list[list[int]]:
    return [batch[..., 0].flatten().tolist() for batch in loader]


def whole_epoch(loader) -> list[int]:
    return list(chain(*epoch(loader)))


def test_training_images_are_mirrored_at_random():
    data = Arrows(batch_size=11, flip=True)
    loader = data.train_dataloader()
    epochs = [whole_epoch(loader) for _ in range(200)]
    assert all(sorted(value // 2 for value in values) == list(range(22)) for values in epochs)
    mirrored = torch.tensor([[value % 2 for value in sorted(values)] for values in epochs]).double()
    assert mirrored.mean() == pytest.approx(0.5, abs=4 * 0.5 / mirrored.numel() ** 0.5)
    assert ((mirrored.mean(0) - 0.5).abs() < 4 * 0.5 / 200**0.5).all()  # each image in half of the epochs
    assert torch.equal(data.raw("train"), Arrows().raw("train"))  # in place nothing is mirrored
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert whole_epoch(loader) == list(range(0, 44, 2))
    plain = Arrows(batch_size=11).train_dataloader()
    assert [[value // 2 for value in values] for values in epochs[:2]] == [
        [value // 2 for value in whole_epoch(plain)] for _ in range(2)
    ]  # the order is that without mirroring


@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (3, 1), (4, 0), (6, 0)])
def test_mirroring_continues_where_a_run_stopped(stop, workers):
    def make(number_of_workers=0):
        return Arrows(batch_size=5, flip=True, num_workers=number_of_workers).train_dataloader()

    whole = make()
    expected = [*epoch(whole), *epoch(whole)]
    stopped = make()
    if stop > 4:
        epoch(stopped)
    iterator = iter(stopped)
    for _ in range(stop - 4 if stop > 4 else stop):
        next(iterator)
    resumed = make(workers)
    resumed.load_state_dict(stopped.state_dict())
    rest = epoch(resumed) if stop >= 4 else [*epoch(resumed), *epoch(resumed)]
    assert rest == expected[stop:]


def test_mirroring_depends_on_seed_epoch_and_rank():
    def drawn(seed=0, rank=0, number=0):
        data = Arrows(batch_size=5, flip=True, seed=seed)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, current_epoch=number)
        return [value % 2 for value in whole_epoch(data.train_dataloader())]

    assert drawn() == drawn()
    assert len({tuple(drawn(*case)) for case in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}) == 4


@pytest.mark.parametrize(("target", "source"), [(True, True), (True, False), (False, True), (False, False)])
def test_unpaired_images_are_mirrored_on_their_own(target, source):
    pairs = Pairs(Arrows(flip=target), Arrows(7, first=30, flip=source), batch_size=11)
    assert pairs.flip == (target or source)
    loader = pairs.train_dataloader()
    values = torch.cat([batch[..., 0].flatten(1) for _ in range(200) for batch in loader])
    assert (values // 2).unique(dim=0).shape[0] == 22 * 7  # all combinations
    turned = (values % 2).double()
    near = pytest.approx
    assert turned.mean(0).tolist() == near([0.5 * target, 0.5 * source], abs=0.031)
    assert (turned[:, 0] * turned[:, 1]).mean() == near(0.25 * target * source, abs=0.027)
    assert (pairs.raw("val") % 2 == torch.tensor([0, 1])).all()


def test_paired_images_are_mirrored_together():
    pairs = Pairs(Arrows(flip=True), Arrows(first=30, flip=True), paired=True, batch_size=11)
    loader = pairs.train_dataloader()
    values = torch.cat([batch[..., 0].flatten(1) for _ in range(50) for batch in loader])
    assert (values[:, 1] == values[:, 0] + 60).all()
    assert (values[:, 0] % 2).double().mean() == pytest.approx(0.5, abs=0.06)
    with pytest.raises(ConfigError, match="set flip of both parts, or of neither"):
        Pairs(Arrows(flip=True), Arrows(), paired=True)


def test_only_images_are_mirrored(tmp_path):
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(50, 3)))
    data = Files(str(tmp_path / "vectors.npy"), flip=True, batch_size=4)
    with pytest.raises(ConfigError, match=r"the samples have shape \(3,\): set flip=false"):
        data.train_dataloader()
    write_images(tmp_path / "images", 40, 4)
    assert Files(str(tmp_path / "images"), flip=True, batch_size=4).train_dataset().variants == 2


def test_records_of_other_data_and_labels(standins):
    pairs = Pairs(benchmark("AFHQ", standins, classes=["dog"]), benchmark("AFHQ", standins, classes=["cat"]))
    record = pairs.record()
    assert json.loads(json.dumps(record)) == record
    assert (record["target"]["classes"], record["source"]["classes"]) == (["dog"], ["cat"])
    assert record["sizes"] == {"train": 23, "val": 1, "test": 4}
    assert pairs.labels("test").tolist() == [1] * 4
    assert Digits(digit=4).labels("test").unique().tolist() == [4]
    assert Digits(digit=4).record()["classes"] == ["4"]
    assert Toy2D(Blob, train_size=10, eval_size=5).labels("train") is None  # one part
    assert Toy2D(train_size=10, eval_size=5).record()["shape"] == [2]


def test_preparing_a_pair_prepares_both(tmp_path):
    write_celeba_hq(tmp_path)
    missing = benchmark("AFHQ", tmp_path)
    with pytest.raises(DataError, match="afhq is missing"):
        Pairs(benchmark("CelebAHQ", tmp_path), missing).prepare_data()
    with pytest.raises(DataError, match="afhq is missing"):
        Pairs(missing, benchmark("CelebAHQ", tmp_path)).prepare_data()


# ----------------------------------------------------------------------------------------------------------- the real files

ROOT = os.environ.get("NFDM_DATA", "")


def level_std(images: torch.Tensor) -> float:
    counts = torch.bincount(images.flatten(), minlength=256).double()
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean = (counts * levels).sum() / counts.sum()
    return ((counts * (levels - mean) ** 2).sum() / counts.sum()).sqrt().item()


@pytest.mark.skipif(not Path(ROOT, "cifar-10-batches-bin").is_dir() or not ROOT, reason="NFDM_DATA has no CIFAR-10")
def test_the_real_cifar():
    data = CIFAR10(protocol="held_out")
    assert data.sizes() == {"train": 45_000, "val": 5_000, "test": 5_000}
    assert level_std(data.raw("train")) == pytest.approx(data.data_std, abs=0.002)
    counts = torch.bincount(torch.cat([data.labels("train"), data.labels("val")]))
    assert counts.tolist() == [5_000] * 10
    assert data.record()["checksum"] == CIFAR10(protocol="held_out").checksum


@pytest.mark.skipif(not Path(ROOT, "mnist").is_dir() or not ROOT, reason="NFDM_DATA has no MNIST")
def test_the_real_mnist():
    data = MNIST()
    assert data.sizes() == {"train": 55_000, "val": 5_000, "test": 10_000}
    assert level_std(data.raw("train")) == pytest.approx(data.data_std, abs=0.002)
    assert data.labels("train")[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.labels("test")[:5].tolist() == [7, 2, 1, 0, 4]

"""DataModules: densities, splits, resumable order, parts of ranks, and files of a user's own with their faults."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nfdm_lightning.data import (
    Blob,
    Checkerboard,
    DataModule,
    Digits,
    EightGaussians,
    Files,
    Pairs,
    Pinwheel,
    Toy2D,
    TwoMoons,
)
from nfdm_lightning.errors import ConfigError, DataError

FLOAT32 = True


class Counting(DataModule):
    """The numbers 0 .. n-1, so that batches say which samples they hold."""

    def __init__(self, number: int = 22, **settings) -> None:
        super().__init__(**settings)
        self.number = number

    @property
    def shape(self):
        return (1,)

    def arrays(self):
        column = torch.arange(float(self.number))[:, None]
        return {"train": column, "val": column, "test": column}


def taken(loader, number: int | None = None) -> list[list[float]]:
    return [batch[:, 0].tolist() for batch, _ in zip(loader, range(number or 10**9))]  # noqa: B905


@pytest.mark.parametrize("distribution", [EightGaussians(), TwoMoons(), Checkerboard(), Pinwheel(), Blob((3.0, 0.0))])
def test_scale_of_the_toys(distribution):
    x = distribution.sample(100_000, torch.Generator().manual_seed(0))
    assert x.shape == (100_000, 2)
    assert x.dtype == torch.float32
    assert (x**2).mean().sqrt().item() == pytest.approx(distribution.data_std, rel=0.02)
    assert torch.equal(x[:5], distribution.sample(100_000, torch.Generator().manual_seed(0))[:5])


@pytest.mark.parametrize("distribution", [EightGaussians(), Checkerboard(), Blob((1.0, -0.5), 0.7)])
def test_densities_are_those_of_the_samples(distribution):
    """Integrates to one, its entropy is the mean of -log p over samples, and cell by cell it predicts the counts."""
    x = distribution.sample(200_000, torch.Generator().manual_seed(0)).double()
    log_prob = distribution.log_prob(x)
    assert log_prob.isfinite().all()
    error = log_prob.std().item() / len(x) ** 0.5
    assert -log_prob.mean().item() == pytest.approx(distribution.entropy(), abs=4 * error + 1e-3)
    edges = torch.arange(-6, 6.01, 0.5).double()
    middle = edges[:-1] + 0.25
    fine = middle[:, None] + (torch.arange(20) + 0.5) / 40 - 0.25
    points = torch.cartesian_prod(fine.flatten(), fine.flatten())
    cells = distribution.log_prob(points).exp().reshape(len(middle), 20, len(middle), 20).mean((1, 3)) * 0.25
    assert cells.sum().item() == pytest.approx(1.0, abs=1e-3)
    counts = torch.from_numpy(np.histogram2d(x[:, 0].numpy(), x[:, 1].numpy(), bins=edges.numpy())[0]) / len(x)
    assert (counts - cells).abs().max() < 5 * (cells.max() / len(x)) ** 0.5


def test_eight_gaussians_as_specified():
    assert EightGaussians().entropy() == pytest.approx(2.83, abs=0.005)
    x = EightGaussians().sample(100_000, torch.Generator().manual_seed(1)) * math.sqrt(2)
    angle = torch.atan2(x[:, 1], x[:, 0]) * 4 / math.pi
    mode = angle.round() % 8
    assert torch.bincount(mode.long(), minlength=8).min() > 0.9 * 100_000 / 8
    first = x[mode == 0]
    torch.testing.assert_close(first.mean(0), torch.tensor([4.0, 0.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(first.std(0), torch.tensor([0.5, 0.5]), atol=0.02, rtol=0)


def test_digits():
    data = Digits()
    assert (data.shape, data.levels) == ((1, 8, 8), 17)
    sizes = {name: len(data.split(name)) for name in ("train", "val", "test")}
    assert sizes == {"train": 1297, "val": 200, "test": 300}
    x = data.split("train")
    assert (x.min().item(), x.max().item()) == (-1, 1)
    assert x.std().item() == pytest.approx(data.data_std, rel=0.02)
    level = (x + 1) * 8
    torch.testing.assert_close(level, level.round())
    batch = next(iter(data.train_dataloader()))
    assert batch.dtype == torch.uint8
    assert data.on_after_batch_transfer(batch, 0).dtype == torch.float32


def test_toy_splits_differ_and_repeat():
    data = Toy2D(train_size=1000, eval_size=100)
    parts = [data.split(name) for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1000, 100, 100]
    assert not torch.isin(parts[1], parts[2]).any()
    assert torch.equal(Toy2D(train_size=1000, eval_size=100).split("test"), parts[2])


def test_epochs_are_shuffled_differently_and_repeat():
    loader = Counting(batch_size=5).train_dataloader()
    first, second = taken(loader), taken(loader)
    assert [len(batch) for batch in first] == [5] * 4
    assert first != second
    again = Counting(batch_size=5).train_dataloader()
    assert [taken(again), taken(again)] == [first, second]
    assert taken(Counting(batch_size=5, seed=1).train_dataloader()) != first


@pytest.mark.parametrize(("stop", "workers"), [(0, 0), (1, 0), (3, 0), (4, 0), (6, 0), (6, 1)])
def test_order_continues_where_a_run_stopped(stop, workers):
    """An epoch has 4 batches; a run that stopped after any number of them goes on with the next."""
    whole = Counting(batch_size=5).train_dataloader()
    expected = [*taken(whole), *taken(whole)]
    stopped = Counting(batch_size=5).train_dataloader()
    if stop > 4:
        taken(stopped)
    iterator = iter(stopped)
    for _ in range(stop - 4 if stop > 4 else stop):
        next(iterator)
    resumed = Counting(batch_size=5, num_workers=workers).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    rest = taken(resumed) if stop > 4 or stop == 4 else [*taken(resumed), *taken(resumed)]
    assert rest == expected[stop:]


def test_an_epoch_cut_short_is_not_continued():
    loader = Counting(batch_size=5).train_dataloader()
    first = taken(loader, 2)
    second = taken(loader)
    fresh = Counting(batch_size=5).train_dataloader()
    assert first == taken(fresh)[:2]
    assert second == taken(fresh)


def test_ranks_take_every_sample_once():
    parts = []
    for rank in range(3):
        data = Counting(batch_size=2, eval_batch_size=4)
        data.trainer = SimpleNamespace(world_size=3, global_rank=rank, current_epoch=0)
        loaders = (data.train_dataloader(), data.val_dataloader())
        parts.append([[value for batch in taken(loader) for value in batch] for loader in loaders])
    train = [value for part in parts for value in part[0]]
    assert len(train) == len(set(train)) == 18  # three batches of two each
    assert sorted(value for part in parts for value in part[1]) == list(range(22))
    assert parts[1][1] == [1, 4, 7, 10, 13, 16, 19]  # place i of rank r is sample r + 3 i, as the NLL callback has it


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="batch_size=30 is more than the 22"):
        Counting(batch_size=30).train_dataloader()
    with pytest.raises(ConfigError, match="at least 1"):
        Counting(batch_size=0)
    data = Counting(2)
    data.trainer = SimpleNamespace(world_size=3, global_rank=0, current_epoch=0)
    with pytest.raises(ConfigError, match="fewer than the 3 processes"):
        data.val_dataloader()


def write_images(folder, number=20, size=(6, 4), mode="RGB", suffix="png"):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(number):
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:03d}.{suffix}")


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_folder_of_images(tmp_path, mode, channels):
    write_images(tmp_path / "a", mode=mode)
    data = Files(str(tmp_path))
    assert (data.shape, data.levels) == ((channels, 4, 6), 256)
    splits = data.arrays()
    assert {name: len(array) for name, array in splits.items()} == {"train": 16, "val": 2, "test": 2}
    pixels = np.asarray(Image.open(tmp_path / "a" / "000.png")).reshape(4, 6, channels).transpose(2, 0, 1)
    assert any(torch.equal(image, torch.from_numpy(pixels.copy())) for array in splits.values() for image in array)
    assert torch.equal(splits["test"], Files(str(tmp_path), seed=5).arrays()["test"])


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (np.zeros((30, 5, 6), np.uint8), (1, 5, 6)),
        (np.zeros((30, 5, 6, 3), np.uint8), (3, 5, 6)),
        (np.zeros((30, 3, 5, 6), np.uint8), (3, 5, 6)),
        (np.ones((30, 7), np.float64), (7,)),
    ],
)
def test_array_files(tmp_path, array, shape):
    np.save(tmp_path / "a.npy", array)
    data = Files(str(tmp_path / "a.npy"))
    assert data.shape == shape
    assert data.levels == (256 if array.dtype == np.uint8 else None)
    np.savez(tmp_path / "b.npz", train=array, test=array[:4])
    assert len(Files(str(tmp_path / "b.npz")).arrays()["test"]) == 4


def faulty(tmp_path, kind: str) -> str:
    path = tmp_path / "data.npz"
    images = np.zeros((20, 4, 4), np.uint8)
    if kind == "missing":
        return str(tmp_path / "nowhere")
    if kind == "unknown":
        (tmp_path / "data.csv").write_text("1,2")
        return str(tmp_path / "data.csv")
    if kind == "empty":
        (tmp_path / "empty").mkdir()
        return str(tmp_path / "empty")
    if kind == "pickle":
        np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
        return str(tmp_path / "a.npy")
    if kind == "truncated":
        np.savez(path, train=images)
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "names":
        np.savez(path, a=images, b=images)
    elif kind == "levels":
        np.savez(path, train=images + 200)
        return str(path)
    elif kind == "nan":
        floats = np.ones((20, 3))
        floats[7, 1] = np.nan
        np.savez(path, train=floats)
    elif kind == "integers":
        np.savez(path, train=np.ones((20, 3), np.int64))
    elif kind == "few":
        np.savez(path, train=images[:5])
    elif kind == "differ":
        np.savez(path, train=images, test=images[:, :3])
    elif kind in ("text", "sizes", "modes", "deep"):
        write_images(tmp_path / "images")
        if kind == "text":
            (tmp_path / "images" / "zzz.png").write_text("not an image")
        else:
            shapes = {"modes": (4, 6), "sizes": (5, 6, 3), "deep": (4, 6)}
            extra = np.zeros(shapes[kind], np.uint16 if kind == "deep" else np.uint8)
            Image.fromarray(extra).save(tmp_path / "images" / "zzz.png")
        return str(tmp_path / "images")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "nowhere does not exist"),
        ("unknown", "data.csv: unknown kind"),
        ("empty", "holds no images"),
        ("pickle", "cannot be read"),
        ("truncated", "data.npz cannot be read"),
        ("names", "arrays a, b; name one of them 'train'"),
        ("levels", "value 200 is not below levels=17"),
        ("nan", "1 samples have NaN or infinite values, first at index 7"),
        ("integers", "type int64; convert"),
        ("few", "too few to hold out"),
        ("differ", "differ in shape"),
        ("text", "zzz.png is not a readable image"),
        ("deep", "zzz.png has colour mode I;16"),
        ("sizes", "zzz.png is 5x6, but .*000.png is 4x6"),
        ("modes", "zzz.png is L, but .*000.png is RGB"),
    ],
)
def test_faulty_files_are_named(tmp_path, kind, message):
    with pytest.raises(DataError, match=message):
        Files(faulty(tmp_path, kind), levels=17 if kind == "levels" else 256)


def test_an_iterator_not_used_is_no_epoch():
    loader = Counting(batch_size=5).train_dataloader()
    iter(loader)
    assert taken(loader) == taken(Counting(batch_size=5).train_dataloader())
    resumed = Counting(batch_size=5).train_dataloader()
    resumed.load_state_dict({"epoch": 0, "batch": 2})
    iter(resumed)
    assert taken(resumed) == taken(Counting(batch_size=5).train_dataloader())[2:]


def test_digits_of_one_class():
    eights, everything = Digits(digit=8), Digits()
    assert 100 < len(eights.raw("train")) < 160
    for split in ("train", "val", "test"):  # the same split: no eight of the test set is trained on
        whole = {image.numpy().tobytes() for image in everything.raw(split)}
        assert all(image.numpy().tobytes() in whole for image in eights.raw(split))
    assert sum(len(Digits(digit=k).raw("test")) for k in range(10)) == 300
    with pytest.raises(ConfigError, match="digit=10"):
        Digits(digit=10)


def counted_pairs(paired: bool = False, sources: int = 7, **settings) -> Pairs:
    return Pairs(Counting(22), Counting(22 if paired else sources), paired, batch_size=5, **settings)


def pairs_of(loader, number: int | None = None) -> list[list[tuple[float, float]]]:
    batches = zip(loader, range(number or 10**9))  # noqa: B905
    return [[(float(pair[0]), float(pair[1])) for pair in batch] for batch, _ in batches]


def test_unpaired_data_meet_fresh_partners_in_every_epoch():
    loader = counted_pairs().train_dataloader()
    epochs = [[pair for batch in pairs_of(loader) for pair in batch] for _ in range(100)]
    for epoch in epochs:
        assert len({target for target, _ in epoch}) == 20  # four whole batches of 22
    partners = [{source for epoch in epochs for target, source in epoch if target == k} for k in range(22)]
    assert all(partner == set(map(float, range(7))) for partner in partners)
    flat = torch.tensor([pair for epoch in epochs for pair in epoch])
    assert torch.corrcoef(flat.T)[0, 1].abs() < 0.1
    assert pairs_of(counted_pairs().train_dataloader()) == pairs_of(counted_pairs().train_dataloader())


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_unpaired_order_continues_where_a_run_stopped(stop):
    whole = counted_pairs().train_dataloader()
    expected = [*pairs_of(whole), *pairs_of(whole)]
    stopped = counted_pairs().train_dataloader()
    if stop > 4:
        pairs_of(stopped)
    iterator = iter(stopped)
    for _ in range(stop - 4 if stop > 4 else stop):
        next(iterator)
    resumed = counted_pairs().train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    rest = pairs_of(resumed) if stop >= 4 else [*pairs_of(resumed), *pairs_of(resumed)]
    assert rest == expected[stop:]


def test_paired_data_stay_together_and_evaluation_pairs_are_fixed():
    for batch in pairs_of(counted_pairs(paired=True).train_dataloader()):
        assert all(target == source for target, source in batch)
    first, second = (pairs_of(counted_pairs().val_dataloader()) for _ in range(2))
    assert first == second
    assert sorted(target for batch in first for target, _ in batch) == list(range(22))
    assert {source for batch in first for _, source in batch} == set(range(7))


def test_ranks_of_unpaired_data_draw_different_partners():
    parts = []
    for rank in range(2):
        data = counted_pairs()
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, current_epoch=0)
        parts.append([pair for batch in pairs_of(data.train_dataloader()) for pair in batch])
    targets = [target for part in parts for target, _ in part]
    assert len(targets) == len(set(targets)) == 20
    assert [source for _, source in parts[0]] != [source for _, source in parts[1]]


class Bytes(DataModule):
    """Images of a given number of levels."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    @property
    def shape(self):
        return (1,)

    @property
    def levels(self):
        return self.count

    def arrays(self):
        column = torch.arange(self.count, dtype=torch.uint8)[:, None]
        return {"train": column, "val": column, "test": column}


def test_each_side_of_a_pair_is_normalised_by_its_own_levels():
    pairs = Pairs(Bytes(5), Bytes(3))
    assert (pairs.shape, pairs.levels, pairs.data_std) == ((1,), 5, 1.0)
    split = pairs.split("val")
    assert split.shape == (5, 2, 1)
    torch.testing.assert_close(split[:, 0, 0], torch.linspace(-1, 1, 5))
    assert set(split[:, 1, 0].tolist()) == {-1.0, 0.0, 1.0}
    mixed = Pairs(Bytes(5), Counting(5))  # levels on one side: both as floats
    assert mixed.raw("val").dtype == torch.float32
    torch.testing.assert_close(mixed.split("val")[:, 0, 0], torch.linspace(-1, 1, 5))
    torch.testing.assert_close(pairs.sources(4), torch.tensor([[-1.0], [0.0], [1.0], [-1.0]]))
    torch.testing.assert_close(Counting(3).sources(4)[:, 0], torch.tensor([0.0, 1.0, 2.0, 0.0]))


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"shape \(2,\), the source \(1, 8, 8\)"):
        Pairs(Toy2D(), Digits())
    with pytest.raises(ConfigError, match="22 targets and 7 sources in the train split"):
        Pairs(Counting(22), Counting(7), paired=True).train_dataloader()

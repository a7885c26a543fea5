"""FID and its kin: formulas, cached reference statistics, samples that do not depend on batch or process."""

import json
import math
from functools import partial
from urllib.error import URLError

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from scipy import linalg
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from conftest import small_data, small_model, small_trainer, small_unet
from nfdm_lightning.callbacks import EMA, FID, fid
from nfdm_lightning.cli_errors import Parser
from nfdm_lightning.data import DataModule, Digits, Pairs, to_levels
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.features import CifarResNet, FeatureExtractor, Inception, NetworkFeatures, _ResNet56
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.predictor import XPrediction
from nfdm_lightning.processes import Bridge, Gaussian
from nfdm_lightning.solvers import Adaptive, Ancestral, Euler, EulerMaruyama, Heun, Solution, TorchSDE


class Random(nn.Module):
    """A small random network, the same every time."""

    def __init__(self, seed: int = 0, width: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(width, 3, 3, 3, generator=generator, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight).relu().mean((2, 3))


class WithLogits(FeatureExtractor):
    """The same with logits."""

    def __init__(self) -> None:
        super().__init__("random", 5, 5)
        self.network = Random().double()  # whose rounding does not depend on the batch as that of float32 does
        self.weights_md5 = "fixed"

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network(images.double() / 255)
        return features, 3 * features


def features() -> NetworkFeatures:
    return NetworkFeatures(Random, "random", 5)


def model(**settings: object) -> NeuralDiffusion:
    torch.manual_seed(0)
    predictor = partial(XPrediction, network=partial(small_unet, multipliers=(1,)))
    return small_model(
        shape=(1, 8, 8), levels=17, decoder_std=None, **{"process": Gaussian, "predictor": predictor, **settings}
    )


class Few(Digits):
    """Forty digits of each split."""

    def arrays(self) -> dict[str, Tensor]:
        return {name: images[:40] for name, images in super().arrays().items()}


def measure(folder, callback: FID, data: DataModule | None = None, built: NeuralDiffusion | None = None, **settings: object):
    """Runs a test and returns the callback's results and what was logged."""
    trainer = small_trainer(folder, precision="64-true", callbacks=[callback], **settings)
    logged = trainer.test(built or model(), data or Few(), verbose=False)[0]
    return callback.results, logged


def numbers(results: list[dict]) -> Tensor:
    return torch.tensor([[r["value"], r.get("std", 0.0)] for r in results])


def gaussian_distance(a: Tensor, b: Tensor) -> float:
    """The Frechet distance by scipy's matrix square root."""
    a, b = a.double().numpy(), b.double().numpy()
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(covariance_a @ covariance_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance_a + covariance_b - 2 * root))


def by_hand(callback: FID, built: NeuralDiffusion, number: int) -> Tensor:
    """Features of the samples, drawn in one batch."""
    generators = [torch.Generator().manual_seed(fid.mixed_seed(fid._SAMPLES, callback.seed, i)) for i in range(number)]
    x, _ = built.double().eval().sample(number, next(iter(callback.solvers.values())), generators)
    pixels = (to_levels(x, 17).double() * 255 / 16).round().to(torch.uint8)
    return callback.features(pixels)[0]


def pixels_of(data: DataModule, split: str = "train") -> Tensor:
    return (data.raw(split).double() * 255 / 16).round().to(torch.uint8)


@pytest.fixture
def few_subsets(monkeypatch) -> None:
    monkeypatch.setattr(fid, "_KID_SUBSET_SIZE", 12)
    monkeypatch.setattr(fid, "_KID_SUBSETS", 5)


def test_the_distance_is_that_of_scipy_and_carries_its_protocol(tmp_path):
    built, data = model(), Few()
    callback = FID(features(), [Ancestral(4)], number=30, batch_size=8, cache=str(tmp_path))
    results, logged = measure(tmp_path, callback, data, built)
    samples, reference = by_hand(callback, built, 30), callback.features(pixels_of(data))[0]
    expected = gaussian_distance(reference, samples)
    assert expected > 1e-3
    assert results[0]["value"] == pytest.approx(expected, rel=1e-8)
    assert logged == {"test/fd_random@Ancestral4": pytest.approx(expected, rel=1e-5)}
    whole = FrechetInceptionDistance(fid._Identity(5))  # ours sums over batches and processes
    whole.update(reference.double(), real=True)
    whole.update(samples.double(), real=False)
    assert results[0]["value"] == pytest.approx(float(whole.compute()), rel=1e-8)
    assert json.loads(json.dumps(results)) == [
        {
            "metric": "fd_random",
            "value": results[0]["value"],
            "sampler": "Ancestral4",
            "solver": {"class": "Ancestral", "nfe": 4, "steps": 4, "stochasticity": 1.0},
            "nfe": 4.0,
            "labels": None,
            "guidance": 1.0,
            "number": 30,
            "seed": 0,
            "batch_size": 8,
            "precision": "float64",
            "ema": False,
            "reference_split": "train",
            "reference_size": 40,
            "data": "Few",
            "data_checksum": data.checksum,
            "extractor": "NetworkFeatures",
            "features": "random",
            "num_features": 5,
            "weights_md5": callback.features.weights_md5,
            "resizing": "none",
            "source_split": None,
        }
    ]
    assert callback.features.network.weight.device.type == "cpu"
    assert not any("features" in name for name, _ in built.named_modules())


def test_kernel_distance_and_inception_score_by_hand(tmp_path, few_subsets):
    built, data = model(), Few()
    callback = FID(WithLogits(), [Euler(3)], 30, kid=True, inception_score=True, cache=str(tmp_path), seed=7)
    results, logged = measure(tmp_path, callback, data, built)
    assert [r["metric"] for r in results] == ["fd_random", "kd_random", "score_random"]
    assert set(logged) == {f"test/{r['metric']}@Euler3" for r in results}
    fake = by_hand(callback, built, 30).double()
    # features are kept of 30 of the 40 samples of the reference, evenly
    real = callback.features(pixels_of(data)[torch.arange(30) * 40 // 30])[0].double()
    state = torch.manual_seed(1).get_state()
    assert fid._score(fid._Statistics(*[fake] * 5), 7, fake.device) != fid._score(
        fid._Statistics(*[fake] * 5), 8, fake.device
    )
    assert torch.get_rng_state().equal(state)  # the global generator is left as it was
    torch.manual_seed(7)
    values = []
    for _ in range(5):
        x, y = real[torch.randperm(30)[:12]], fake[torch.randperm(30)[:12]]
        total = 0.0
        for i in range(12):
            for j in range(12):
                same = (1 + x[i] @ x[j] / 5) ** 3 + (1 + y[i] @ y[j] / 5) ** 3
                total += (float(same) / (12 * 11) if i != j else 0.0) - 2 * float((1 + x[i] @ y[j] / 5) ** 3) / 144
        values.append(total)
    assert results[1]["value"] == pytest.approx(np.mean(values), rel=1e-6)
    assert results[1]["std"] == pytest.approx(np.std(values), rel=1e-5)
    assert (results[1]["subsets"], results[1]["subset_size"]) == (5, 12)
    torch.manual_seed(7)
    parts = (3 * fake)[torch.randperm(30)].softmax(1).chunk(10)
    scores = [math.exp(float((p * (p / p.mean(0)).log()).sum(1).mean())) for p in parts]
    assert results[2]["value"] == pytest.approx(np.mean(scores), rel=1e-6)
    assert results[2]["std"] == pytest.approx(np.std(scores, ddof=1), rel=1e-4)
    again, _ = measure(tmp_path, callback, data, built)
    torch.testing.assert_close(numbers(again), numbers(results), rtol=1e-12, atol=0)


def test_a_difference_between_data_and_itself_is_none(tmp_path):
    """The distance of a split to itself is zero, to another it is not."""

    class Copies(NeuralDiffusion):
        def sample(self, number, solver=None, generator=None, trajectory=False, source=None, label=None, guidance=1.0):
            self.place = getattr(self, "place", 0) + number
            x = data.split("val")[self.place - number : self.place].double()
            return x, Solution(x, 1, x.new_empty(0), x.new_empty(0))

    torch.manual_seed(0)
    data, process = Few(), partial(XPrediction, network=partial(small_unet, multipliers=(1,)))
    for split, zero in (("val", True), ("test", False)):
        copies = Copies((1, 8, 8), 17, process=Gaussian, predictor=process)
        callback = FID(features(), [Euler(1)], 40, split, batch_size=16, cache=str(tmp_path))
        value = measure(tmp_path, callback, data, copies)[0][0]["value"]
        assert (abs(value) < 1e-7) == zero


def test_levels_become_pixels():
    levels = torch.arange(17)
    x = levels.double() / 8 - 1
    torch.testing.assert_close(fid._pixels(x, 17), (levels.double() * 255 / 16).round().to(torch.uint8))
    x = Few.normalise(type("Fine", (Few,), {"levels": 256})(), torch.arange(256, dtype=torch.uint8))
    torch.testing.assert_close(fid._pixels(x, 256), torch.arange(256, dtype=torch.uint8))
    torch.testing.assert_close(fid._pixels(x.float(), 256), to_levels(x, 256))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_changes_nothing(tmp_path, few_subsets, batch_size):
    def run(size: int) -> Tensor:
        solvers = [Ancestral(2), EulerMaruyama(2), Heun(2)]
        callback = FID(
            WithLogits(), solvers, 20, batch_size=size, kid=True, inception_score=True, cache=str(tmp_path / str(size))
        )
        return numbers(measure(tmp_path, callback)[0])

    torch.testing.assert_close(run(batch_size), run(20), rtol=1e-6, atol=1e-10)


def test_generators_of_samples():
    """A sample's numbers come from its own generator; one generator gives what it always gave."""
    built = model().double().eval()

    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    for solver in (Ancestral(3), EulerMaruyama(3), Heun(4), Euler(3)):
        both, _ = built.sample(2, solver, seeded(1, 2))
        for place, seed in enumerate((1, 2)):
            alone, _ = built.sample(1, solver, seeded(seed))
            torch.testing.assert_close(both[place : place + 1], alone)
            torch.testing.assert_close(built.sample(1, solver, seeded(seed)[0])[0], alone)
        assert not both[0].equal(both[1])
    one, _ = built.sample(2, TorchSDE(4), seeded(1, 2))
    other, _ = built.sample(2, TorchSDE(4), seeded(1, 2))
    torch.testing.assert_close(one, other)
    with pytest.raises(ConfigError, match="2 generators for 3 samples"):
        built.sample(3, None, seeded(1, 2))


class Save(Callback):
    """Writes the results of rank 0."""

    def __init__(self, path) -> None:
        self.path = path

    def on_test_end(self, trainer, pl_module):
        results = [c.results for c in trainer.callbacks if isinstance(c, FID)]
        if trainer.is_global_zero:
            self.path.write_text(
                json.dumps({"results": results, "logged": {k: float(v) for k, v in trainer.callback_metrics.items()}})
            )


def test_two_ranks_measure_what_one_does(tmp_path, few_subsets):
    """Uneven parts: 21 samples and 39 images of reference; a second callback finds the cache of the first."""
    if torch.cuda.is_initialized():
        pytest.skip("a process that has used CUDA cannot fork")

    class Odd(Few):
        def arrays(self) -> dict[str, Tensor]:
            return {name: images[:39] for name, images in super().arrays().items()}

    found = {}
    for ranks in (1, 2):
        settings = {"kid": True, "inception_score": True, "batch_size": 4, "cache": str(tmp_path / str(ranks))}
        callbacks = [FID(WithLogits(), [Ancestral(2)], 21, **settings), FID(WithLogits(), [Euler(2)], 21, **settings)]
        strategy = "auto" if ranks == 1 else "ddp_fork"
        path = tmp_path / f"{ranks}.json"
        trainer = small_trainer(
            tmp_path, precision="64-true", callbacks=[*callbacks, Save(path)], devices=ranks, strategy=strategy
        )
        trainer.test(model(), Odd(), verbose=False)
        found[ranks] = json.loads(path.read_text())
        assert len(list((tmp_path / str(ranks) / "references").iterdir())) == 1
    for one, two in zip(found[1]["results"], found[2]["results"], strict=True):
        assert len(one) == 3
        torch.testing.assert_close(numbers(two), numbers(one), rtol=1e-6, atol=1e-10)
        assert [{**r, "value": 0, "std": 0} for r in one] == [{**r, "value": 0, "std": 0} for r in two]
    assert found[1]["logged"] == pytest.approx(found[2]["logged"], rel=1e-5)


def reference(folder, callback: FID, data: DataModule | None = None):
    """The reference statistics that a test uses, and how often the extractor was called for them."""
    calls = []
    hook = callback.features.register_forward_hook(lambda module, images, output: calls.append(len(output[0])))
    value = measure(folder, callback, data)[0][0]["value"]
    hook.remove()
    return value, sum(calls) - callback.number


def test_reference_statistics_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("NFDM_CACHE", str(tmp_path / "cache"))
    first = FID(features(), [Euler(1)], 6)
    fresh, passed = reference(tmp_path, first)
    assert passed == 40
    folder = tmp_path / "cache" / "references"
    (path,) = folder.iterdir()
    assert path.suffix == ".safetensors"
    second = FID(features(), [Euler(1)], 6)
    cached, passed = reference(tmp_path, second)
    assert (cached, passed) == (fresh, 0)

    class Changed(Few):
        def arrays(self) -> dict[str, Tensor]:
            splits = super().arrays()
            splits["train"][3, 0, 4, 4] += 1
            return splits

    for other, data in (
        (FID(features(), [Euler(1)], 6), Changed()),
        (FID(features(), [Euler(1)], 6, split="val"), Few()),
        (FID(NetworkFeatures(partial(Random, 1), "random", 5), [Euler(1)], 6), Few()),
        (FID(features(), [Euler(1)], 6, kid=True), Few()),
    ):
        before = len(list(folder.iterdir()))
        assert reference(tmp_path, other, data)[1] == 40
        assert len(list(folder.iterdir())) == before + 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "nothing", "other"])
def test_a_damaged_cache_is_computed_anew(tmp_path, damage):
    callback = FID(features(), [Euler(1)], 6, cache=str(tmp_path))
    fresh, _ = reference(tmp_path, callback)
    (path,) = (tmp_path / "references").iterdir()
    content = bytearray(path.read_bytes())
    content[-4] ^= 255
    damaged = {"cut": content[:-9], "flipped": content, "nothing": b"", "other": b"\x80\x04K\x01." * 100}[damage]
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match="is damaged .* computed anew"):
        again, passed = reference(tmp_path, FID(features(), [Euler(1)], 6, cache=str(tmp_path)))
    assert (again, passed) == (fresh, 40)
    assert reference(tmp_path, FID(features(), [Euler(1)], 6, cache=str(tmp_path))) == (fresh, 0)


def test_a_cache_that_cannot_be_written_is_only_a_warning(tmp_path):
    (tmp_path / "file").write_text("no folder")
    callback = FID(features(), [Euler(1)], 6, cache=str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert math.isfinite(measure(tmp_path, callback)[0][0]["value"])


def test_the_validation_measures_the_averaged_weights_every_few_epochs(tmp_path):
    class Follow(Callback):
        seen: tuple = ()

        def on_validation_end(self, trainer, pl_module):
            self.seen += ("val/fd_random@Euler1" in trainer.callback_metrics,)
            trainer.callback_metrics.pop("val/fd_random@Euler1", None)

    follow, callback = Follow(), FID(features(), [Euler(1)], 8, every_n_epochs=2, cache=str(tmp_path))
    data, built = Few(batch_size=20), model()
    average = EMA(0.9)
    trainer = small_trainer(
        tmp_path,
        callbacks=[average, callback, follow],
        max_steps=-1,
        max_epochs=2,
        num_sanity_val_steps=1,
        precision="64-true",
    )
    trainer.fit(built, data)
    assert callback.results[0]["ema"]
    value = callback.results[0]["value"]
    # after the fit the weights are the average
    expected = gaussian_distance(callback.features(pixels_of(data))[0], by_hand(callback, built, 8))
    assert value == pytest.approx(expected, rel=1e-7)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert follow.seen[-2:] == (False, True)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("averaged", [True, False])
def test_the_record_says_whether_a_checkpoint_was_averaged(tmp_path, averaged):
    trainer = small_trainer(
        tmp_path,
        callbacks=[EMA()] if averaged else [],
        max_steps=1,
        limit_val_batches=0,
        enable_checkpointing=False,
        precision="64-true",
    )

    class Keep(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "kept.ckpt")

    trainer.callbacks.append(Keep())
    trainer.fit(model(), Few(batch_size=20))
    callback = FID(features(), [Euler(1)], 4, cache=str(tmp_path))
    tester = small_trainer(tmp_path, callbacks=[callback], precision="64-true")
    tester.test(model(), Few(), ckpt_path=tmp_path / "kept.ckpt", weights_only=True, verbose=False)
    assert callback.results[0]["ema"] == averaged


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_a_bridge_starts_from_the_sources_of_the_split(tmp_path):
    data = Pairs(Few(), Few(digit=3))
    predictor = partial(XPrediction, network=partial(small_unet, multipliers=(1,)))
    network = partial(small_unet, multipliers=(1,))
    torch.manual_seed(0)
    built = NeuralDiffusion((1, 8, 8), 17, process=partial(Bridge, network=network), predictor=predictor)
    callback = FID(features(), [Ancestral(2)], 45, batch_size=20, cache=str(tmp_path))
    results, _ = measure(tmp_path, callback, data, built)
    generators = [torch.Generator().manual_seed(fid.mixed_seed(fid._SAMPLES, 0, i)) for i in range(45)]
    x, _ = built.sample(45, Ancestral(2), generators, source=data.sources(45, "test"))
    # the reference is what is to be generated, not the sources
    expected = gaussian_distance(callback.features(pixels_of(Few()))[0], callback.features(fid._pixels(x, 17))[0])
    assert results[0]["value"] == pytest.approx(expected, rel=1e-7)
    assert results[0]["source_split"] == "test"


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_a_conditional_model_is_sampled_with_the_labels_of_the_reference(tmp_path):
    class Labelled(Few):
        def labels(self, split: str) -> Tensor:
            return super().labels(split)[:40]

    data, built = Labelled(labels=True), model(num_classes=10)
    callback = FID(features(), [Euler(2)], 60, batch_size=25, cache=str(tmp_path), guidance=1.5)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    results, logged = measure(tmp_path, callback, data, built)
    label = torch.arange(60) * 40 // 60
    assert label.bincount().max() == 2  # of every sample's label once or twice
    generators = [torch.Generator().manual_seed(fid.mixed_seed(fid._SAMPLES, 0, i)) for i in range(60)]
    x, _ = built.sample(60, Euler(2), generators, label=data.labels("train")[label], guidance=1.5)
    other, _ = built.sample(60, Euler(2), generators, label=data.labels("train")[: 60 - 20].repeat(2)[:60], guidance=1.5)
    reference = callback.features(pixels_of(data))[0]
    expected, wrong = (gaussian_distance(reference, callback.features(fid._pixels(y, 17))[0]) for y in (x, other))
    assert results[0]["value"] == pytest.approx(expected, rel=1e-7)
    assert abs(expected - wrong) > 1e-4 * expected
    assert (results[0]["labels"], results[0]["guidance"], results[0]["nfe"]) == ("of the train split", 1.5, 4.0)
    assert set(logged) == {"test/fd_random@Euler2_guidance1.5"}


def test_samples_that_are_not_finite_have_no_distance(tmp_path):
    built = model()
    with torch.no_grad():
        next(built.reverse.predictor.parameters()).fill_(math.inf)
    with pytest.warns(UserWarning, match=r"6 of 6 samples of Euler2 are not finite"):
        results, _ = measure(tmp_path, FID(features(), [Euler(2)], 6, cache=str(tmp_path)), built=built)
    assert math.isnan(results[0]["value"])


def test_solvers_are_named_by_what_tells_them_apart():
    solvers = [Ancestral(10), Ancestral(100), Heun(10), Euler(5), Ancestral(10, stochasticity=0.5), Adaptive()]
    names = ["Ancestral10_stochasticity1.0", "Ancestral100", "Heun10", "Euler5", "Ancestral10_stochasticity0.5", "Adaptive"]
    assert list(FID(features(), solvers).solvers) == names
    with pytest.raises(ConfigError, match="Heun4 twice"):
        FID(features(), [Heun(4), Heun(4)])
    assert list(FID(features()).solvers) == ["Ancestral100"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"number": 1}, "number=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"split": "valid"}, "split='valid'"),
        ({"solvers": []}, "empty list"),
        ({"inception_score": True}, "class logits"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        FID(**{"features": features(), **settings})


def test_data_that_are_no_images(tmp_path):
    with pytest.raises(ConfigError, match=r"FID is for images .* Toy2D has samples of shape \(2,\) and continuous values"):
        measure(tmp_path, FID(features(), cache=str(tmp_path)), small_data(), small_model())
    trainer = small_trainer(tmp_path, callbacks=[FID(features(), cache=str(tmp_path))])
    with pytest.raises(ConfigError, match="DataModule of this package"):
        trainer.test(model(), Few().test_dataloader(), verbose=False)


def test_extractors_are_read_lazily_and_a_missing_file_ends_a_run_at_its_start(tmp_path, monkeypatch):
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    callback = FID(number=4, cache=str(tmp_path))
    trainer = small_trainer(tmp_path, callbacks=[callback], max_steps=1, precision="64-true")
    trainer.fit(model(), Few(batch_size=20))  # which needs no features
    message = r"cannot be downloaded .*no network.* fetch https://.*6726825d.pth .* 'weights'"
    with pytest.raises(ConfigError, match=message):
        trainer.test(model(), Few(), verbose=False)
    early = FID(number=4, every_n_epochs=1, cache=str(tmp_path))
    trainer = small_trainer(tmp_path, callbacks=[early], max_steps=1, precision="64-true")
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        trainer.fit(model(), Few(batch_size=20))
    assert trainer.global_step == 0


def test_missing_and_foreign_weights(tmp_path):
    for build in (Inception, CifarResNet):
        with pytest.raises(ConfigError, match=r"there is no weights file nowhere\.pth"):
            build("nowhere.pth")
        path = tmp_path / "weights.pth"
        path.write_bytes(b"<html>")
        with pytest.raises(ConfigError, match="not a readable weights file"):
            build(str(path)).prepare()
        torch.save({"state_dict": {"module.weight": torch.zeros(2)}}, path)
        with pytest.raises(ConfigError, match="does not hold the weights"):
            build(str(path)).prepare()
        torch.save(Random(), path)  # a whole pickled module
        with pytest.raises(ConfigError, match="not a readable weights file"):
            build(str(path)).prepare()


def test_cifar_resnet(tmp_path):
    torch.manual_seed(0)
    network = _ResNet56().float()
    for module in network.modules():  # statistics off their start
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in network.modules()) == 56
    path = tmp_path / "resnet.th"
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}, "best_prec1": 1.0}, path)
    extractor = CifarResNet(str(path))
    extractor.prepare()
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    values, logits = extractor(images)
    assert values.shape == (2, 64)
    mean, std = (np.array(v, dtype=np.float32)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = torch.from_numpy((images.numpy().astype(np.float32) / 255 - mean) / std)
    torch.testing.assert_close(logits, network.eval()(x)[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, network.linear(values))
    assert extractor.label == "fd_cifar-resnet56"
    assert len(extractor.identity()["weights_md5"]) == 32
    # the shortcut of option A: every second pixel between channels of zeros
    block = network.layer2[0]
    for convolution in (block.conv1, block.conv2):
        nn.init.zeros_(convolution.weight)
    nn.init.zeros_(block.bn2.running_mean)
    x = torch.rand(1, 16, 4, 4, dtype=torch.float32)
    y = block.eval()(x)
    torch.testing.assert_close(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].abs().max() == y[:, 24:].abs().max() == 0


def test_the_callback_is_built_from_yaml():
    network = {"class_path": "torch.nn.Conv2d", "init_args": {"in_channels": 3, "out_channels": 4, "kernel_size": 3}}
    arguments = {"network": network, "name": "conv", "num_features": 4}
    extractor = {"class_path": "nfdm_lightning.features.NetworkFeatures", "init_args": arguments}
    settings = {"features": extractor, "solvers": [{"class_path": "Heun", "init_args": {"nfe": 10}}], "number": 100}
    parser = Parser()
    parser.add_subclass_arguments(Callback, "fid")
    config = {"fid": {"class_path": "nfdm_lightning.callbacks.FID", "init_args": settings}}
    callback = parser.instantiate(parser.parse_object(config)).fid
    assert (list(callback.solvers), callback.number, callback.features.name) == (["Heun10"], 100, "conv")
    callback.features.prepare()
    assert callback.features.weights_md5 is not None


def test_grey_images_and_shapes():
    extractor = features()
    extractor.prepare()
    grey = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(extractor(grey)[0], extractor(grey.repeat(1, 3, 1, 1))[0])
    for wrong in (grey.float(), grey[0], grey.repeat(1, 2, 1, 1)):
        with pytest.raises(ConfigError, match="random takes uint8 images"):
            extractor(wrong)
    wide = NetworkFeatures(Random, "random", 4)
    wide.prepare()
    with pytest.raises(ConfigError, match=r"have shape \(3, 5\), not \(3, 4\)"):
        wide(grey)
    with pytest.raises(ConfigError, match="name='a b'"):
        NetworkFeatures(Random, "a b", 4)


def test_only_the_published_inception_is_called_fid(tmp_path, monkeypatch):
    """Random weights in the form of torch-fidelity's file: its features, but not its name."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
    load = nn.Module.load_state_dict
    monkeypatch.setattr(
        nn.Module, "load_state_dict", lambda self, state, *rest, **more: load(self, state or self.state_dict())
    )
    network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    extractor = Inception(str(path))
    extractor.prepare()
    images = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    values, logits = extractor(images)
    expected = network(images.repeat(1, 3, 1, 1))
    torch.testing.assert_close(values, expected[0])
    torch.testing.assert_close(logits, expected[1])
    assert (extractor.num_features, extractor.num_logits) == (values.shape[1], logits.shape[1])
    labels = [extractor.label, extractor.kernel_label, extractor.score_label]
    assert labels == ["fd_inception-v3-compat", "kd_inception-v3-compat", "score_inception-v3-compat"]
    monkeypatch.setattr("nfdm_lightning.features._PUBLISHED_INCEPTION", extractor_sha256(path)[:8])
    published = Inception(str(path))
    published.prepare()
    assert [published.label, published.kernel_label, published.score_label] == ["fid", "kid", "inception_score"]
    assert features().label == "fd_random"
    assert NetworkFeatures(Random, "fid", 5).label == "fd_fid"


def extractor_sha256(path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()

"""Whole runs with labels: what loaders hand out, what training hides, what is saved, and that samples are of their class."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import small_data, small_model, small_trainer
from nfdm_lightning.callbacks import EMA, NLL, SampleGrid, TrainingRecord, Trajectories
from nfdm_lightning.data import MNIST, Blob, Checkerboard, DataModule, Digits, Pairs, Pinwheel, Toy2D, TwoMoons
from nfdm_lightning.errors import ConfigError, DataError
from nfdm_lightning.labels import Labelled
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.networks import ResidualMLP
from nfdm_lightning.pictures import columns_of
from nfdm_lightning.predictor import XPrediction
from nfdm_lightning.processes import SeparableNFDM
from nfdm_lightning.sampling import sample
from nfdm_lightning.solvers import Heun
from standins import write_mnist

FLOAT32 = True


class Marked(DataModule):
    """Images of one grey level that says which sample it is, with a brighter left column; the class is its place mod 3."""

    shape, levels, class_count = (1, 2, 2), 256, 3

    def arrays(self) -> dict[str, Tensor]:
        images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 2, 2)
        images[..., 0] += 100
        return {"train": images, "val": images[:11], "test": images[:7]}

    def labels(self, split: str) -> Tensor:
        return torch.arange(len(self.raw(split))) % 3


def check(batch: Labelled) -> list[int]:
    """Returns which samples a batch of Marked has, each with its label."""
    assert isinstance(batch, Labelled)
    places = batch.samples.flatten(1).amin(1).long()
    assert torch.equal(batch.labels, places % 3)
    return places.tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_go_with_their_samples(workers):
    data = Marked(8, 4, workers, flip=True, labels=True)
    loader = data.train_dataloader()
    epochs = [[check(batch) for batch in loader] for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert all(sorted(itertools.chain(*epoch)) == list(range(40)) for epoch in epochs)
    assert [check(batch) for batch in data.val_dataloader()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert len(next(iter(data.predict_dataloader())).labels) == 4
    if workers:
        return
    flipped = torch.cat([batch.samples for batch in loader])
    assert 0 < (flipped[:, 0, 0, 0] < flipped[:, 0, 0, 1]).sum() < 40  # mirrored, some
    plain = Marked(8, 4, flip=True)
    for labelled, bare in zip(data.train_dataloader(), plain.train_dataloader(), strict=True):
        assert torch.equal(labelled.samples, bare)
    one = data.train_dataloader().dataset[5]
    assert (one.labels.item(), one.samples.shape) == (2, (1, 2, 2))
    resumed = data.train_dataloader()
    resumed.load_state_dict({"epoch": 1, "batch": 3})
    assert [check(batch) for batch in resumed] == epochs[1][3:]
    batch = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    assert batch.samples.max() <= 1
    assert batch.labels.tolist() == [0, 1, 2, 0]


def test_ranks_have_their_own_labels(monkeypatch):
    parts = []
    for rank in range(2):
        data = Marked(8, 4, labels=True)
        monkeypatch.setattr(data, "_ranks", lambda rank=rank: (2, rank))
        loaders = (data.train_dataloader(), data.val_dataloader())
        parts.append([list(itertools.chain(*map(check, loader))) for loader in loaders])
    assert sorted(parts[0][1] + parts[1][1]) == list(range(11))
    assert len(set(parts[0][0] + parts[1][0])) == 32  # whole batches alone


def test_labels_of_the_data(tmp_path):
    assert (Digits(labels=True).num_classes, Digits().num_classes, Digits(digit=3, labels=True).num_classes) == (10, None, 1)
    assert Digits(digit=3, labels=True).model_labels("val").unique().tolist() == [0]
    assert (Digits(labels=True).record()["labels"], Digits().record()["labels"]) == (True, False)
    assert Digits(labels=True).checksum == Digits().checksum
    write_mnist(tmp_path)
    settings = {"root": str(tmp_path), "verify": False, "batch_size": 4, "labels": True}
    assert MNIST(**settings).num_classes == 10
    some = MNIST(classes=[7, 2, 4], **settings)
    assert some.num_classes == 3  # numbered anew, in order
    assert torch.equal(torch.tensor([2, 4, 7])[some.model_labels("train")], some.labels("train"))
    # a toy knows the part that each point is from, and draws the same points as before
    toy = Toy2D(train_size=500, eval_size=20, labels=True)
    nearest = torch.cdist(toy.raw("train").double(), toy.distribution.centres).argmin(1)
    assert (nearest == toy.labels("train")).float().mean() > 0.99
    for kind in (TwoMoons, Pinwheel, Checkerboard):
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        points, labels = kind().labelled_sample(50, generators[0])
        assert torch.equal(points, kind().sample(50, generators[1]))
        assert (labels is None) == (kind().components is None)
        assert labels is None or labels.unique().tolist() == list(range(kind().components))


def test_data_without_labels_are_refused(monkeypatch):
    blob = Toy2D(Blob, 600, 10, labels=True)
    for attempt in (lambda: blob.num_classes, blob.train_dataloader, blob.val_dataloader):
        with pytest.raises(ConfigError, match=r"data.labels=true: Toy2D has no labels"):
            attempt()
    with pytest.raises(ConfigError, match=r"comes without labels; set data.labels=false"):
        Digits().model_labels("train")
    with pytest.raises(ConfigError, match="a bridge takes no labels: set labels of target and source to false"):
        Pairs(Digits(digit=8, labels=True), Digits(digit=3))
    data = Marked(8, labels=True)
    monkeypatch.setattr(data, "labels", lambda split: torch.arange(40))
    with pytest.raises(DataError, match=r"40 samples of the train split have 40 labels from 0 to 39; .*below 3"):
        data.train_dataloader()


def small_classes(**settings: object) -> Toy2D:
    return small_data(labels=True, **settings)


def test_a_share_of_the_labels_is_hidden_and_the_other_draws_stay():
    model = small_model(num_classes=8, label_dropout=0.3)
    label = torch.arange(20_000) % 8
    hidden = model._hide(label, torch.Generator().manual_seed(0))
    assert (hidden == 8).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(hidden[hidden != 8], label[hidden != 8])
    assert (hidden == 8).view(-1, 8).float().mean(0).std() < 0.02  # whatever the class
    assert torch.equal(hidden, model._hide(label, torch.Generator().manual_seed(0)))
    never = small_model(num_classes=8, label_dropout=0.0)
    assert torch.equal(never._hide(label, torch.Generator()), label)


def test_training_hides_labels_from_both_networks(tmp_path):
    seen: dict[str, list[Tensor]] = {"process": [], "predictor": [], "given": [], "times": []}

    class Model(NeuralDiffusion):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            seen["times"].append(self.last_terms.t)
            if isinstance(batch, Labelled):
                seen["given"].append(batch.labels)
            return loss

    def run(model, data):
        model.__class__ = Model
        small_trainer(tmp_path, max_steps=6).fit(model, data)

    model = small_model(num_classes=8, label_dropout=0.5)
    for name in ("process", "predictor"):
        network = getattr(model.reverse, name).network
        network.register_forward_hook(lambda _, args, __, name=name: seen[name].append(args[2]))
    run(model, small_classes())
    given, shown = torch.cat(seen["given"]), torch.cat(seen["predictor"])
    assert shown.shape == given.shape == (6 * 32,)
    assert 0.3 < (shown == 8).float().mean() < 0.7
    assert torch.equal(shown[shown != 8], given[shown != 8])
    for step, label in enumerate(shown.split(32)):  # the process: at x and at x_hat
        assert all(torch.equal(label, other) for other in seen["process"][2 * step : 2 * step + 2])
    # times and noise are those of an unconditional run of the same seed
    times, seen["times"] = torch.cat(seen["times"]), []
    torch.manual_seed(0)
    run(small_model(), small_data())
    assert torch.equal(times, torch.cat(seen["times"]))


def test_a_conditional_run_is_measured_saved_and_sampled(tmp_path, capsys):
    torch.manual_seed(0)
    model, data = small_model(num_classes=8), small_classes()
    callbacks = [NLL(2, 2), EMA(), SampleGrid(8, Heun(2)), Trajectories(8, Heun(2)), TrainingRecord()]
    trainer = small_trainer(tmp_path, max_steps=8, callbacks=callbacks)
    trainer.fit(model, data)
    assert callbacks[-1].samples == 8 * 32
    assert callbacks[-1].settings["data"]["labels"] is True
    measured = trainer.test(model, data, verbose=False)[0]["test/nats"]
    assert len(torch.cat(trainer.predict(model, data))) == 64
    free = [Labelled(data.split("test"), torch.full((64,), 8)), Labelled(data.split("test"), data.labels("test"))]
    assert len({round(model.bound(batch).nats.mean().item(), 3) for batch in free}) == 2
    # the same whatever the batches are
    other = small_classes(eval_batch_size=20)
    assert trainer.test(model, other, verbose=False)[0]["test/nats"] == pytest.approx(measured, rel=1e-5)

    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)["hyper_parameters"]
    assert (stored["num_classes"], stored["label_dropout"]) == (8, 0.1)
    again, label = NeuralDiffusion.load_from_checkpoint(path), model.labels_in_turn(9)
    assert label.tolist() == [*range(8), 0]
    first, second = (
        one.eval().sample(9, Heun(4), torch.Generator().manual_seed(0), label=label, guidance=3.0)[0]
        for one in (model, again)
    )
    assert torch.equal(first, second)

    def labels_of(**settings):
        sample(str(path), Heun(4), **settings)
        return np.load(tmp_path / "run" / "samples" / "labels.npy").tolist(), np.load(tmp_path / "run/samples/samples.npy")

    assert labels_of(number=10)[0] == [*range(8), 0, 1]
    assert "Heun, 4 function evaluations each:" in capsys.readouterr().out
    labels, points = labels_of(number=5, labels=[6, 2], guidance=2.0, batch_size=5)
    assert labels == [6, 2, 6, 2, 6]
    assert "Heun, 8 function evaluations each (two per step of the budget, for guidance=2)" in capsys.readouterr().out
    drawn = again.sample(5, Heun(4), torch.Generator().manual_seed(0), label=torch.tensor(labels), guidance=2.0)[0]
    assert np.array_equal(points, drawn.numpy())
    with pytest.raises(ConfigError, match=r"--labels=\[\]: give one class at least"):
        labels_of(labels=[])
    with pytest.raises(ConfigError, match="whole numbers from 0 to 7"):
        labels_of(labels=[0, 9])


def test_an_unconditional_checkpoint_made_before_there_were_labels_still_loads(tmp_path):
    model, path = small_model(), tmp_path / "checkpoints" / "old.ckpt"
    trainer = small_trainer(tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)

    def without_labels(settings):
        if not isinstance(settings, dict):
            return settings
        return {k: without_labels(v) for k, v in settings.items() if k not in ("num_classes", "label_dropout")}

    stored = torch.load(path, weights_only=True)
    assert stored["hyper_parameters"]["num_classes"] is None
    assert not any("classes" in key for key in stored["state_dict"])
    stored["hyper_parameters"] = without_labels(stored["hyper_parameters"])
    torch.save(stored, path)
    again = NeuralDiffusion.load_from_checkpoint(path)
    draws = [one.eval().sample(3, Heun(4), torch.Generator().manual_seed(0))[0] for one in (model, again)]
    assert torch.equal(*draws)
    assert again.labels_in_turn(3) is None
    with pytest.raises(ConfigError, match=r"--labels=\[1\]: the model is not conditional"):
        sample(str(path), Heun(4), labels=[1])


def test_samples_of_a_trained_model_are_of_their_class(tmp_path):
    network = partial(ResidualMLP, width=32, depth=1)
    parts = {"process": partial(SeparableNFDM, network=network), "predictor": partial(XPrediction, network=network)}
    model = small_model(num_classes=8, lr=5e-3, warmup_steps=10, **parts)
    data = small_classes(train_size=4096, batch_size=256)
    small_trainer(tmp_path, max_steps=200, limit_val_batches=0, gradient_clip_val=1.0).fit(model, data)
    label = model.labels_in_turn(400)
    centres = data.distribution.centres.float()
    for guidance in (1.0, 3.0):
        samples, _ = model.eval().sample(400, Heun(20), torch.Generator().manual_seed(0), label=label, guidance=guidance)
        assert (torch.cdist(samples, centres).argmin(1) == label).float().mean() > 0.9
    free, _ = model.sample(400, Heun(20), torch.Generator().manual_seed(0))
    assert (torch.cdist(free, centres).argmin(1) == label).float().mean() < 0.3  # chance is one in eight


def test_columns_put_a_class_into_each():
    assert columns_of(torch.arange(30) % 10) == 10
    assert columns_of(None) is None
    assert columns_of(torch.zeros(5, dtype=torch.long)) is None
    assert columns_of(torch.arange(1000)) is None

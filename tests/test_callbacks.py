"""Callbacks: the averaged weights are used and saved, the bound is measured right, faults stop a run with its cause."""

import copy
import math
import signal
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from conftest import small_data, small_model, small_trainer
from nfdm_lightning.bound import indexed_draws
from nfdm_lightning.callbacks import (
    EMA,
    NLL,
    HealthCheck,
    LastCheckpoint,
    MeanAndError,
    SampleGrid,
    StopBetweenSteps,
    Trajectories,
)
from nfdm_lightning.errors import ConfigError, NonFiniteError
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.processes import NDM, Gaussian
from nfdm_lightning.solvers import Heun

FLOAT32 = True


class Follow(Callback):
    """An exponential moving average by hand, and what each stage sees."""

    def __init__(self, decay: float) -> None:
        self.decay, self.average, self.seen = decay, None, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        current = {k: v.detach().clone().double() for k, v in pl_module.named_parameters()}
        if self.average is None:
            self.average = current
        else:
            n = trainer.global_step - 1
            decay = min(self.decay, (1 + n) / (10 + n))
            self.average = {k: decay * v + (1 - decay) * current[k] for k, v in self.average.items()}
        self.raw = current

    def look(self, name, pl_module):
        self.seen[name] = {k: v.detach().clone().double() for k, v in pl_module.named_parameters()}

    def on_validation_epoch_end(self, trainer, pl_module):
        self.look("validation", pl_module)
        self.expected = copy.deepcopy(self.average)

    def on_test_epoch_end(self, trainer, pl_module):
        self.look("test", pl_module)


def close(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name].double(), rtol=1e-4, atol=1e-6)


def test_average_is_that_of_hand_and_is_evaluated_saved_and_tested(tmp_path):
    model, follow, keep = small_model(lr=1e-2), Follow(0.9), LastCheckpoint(8)
    keep.dirpath = str(tmp_path)
    # the pictures and metrics of a validation come before and after the averaging callback
    trainer = small_trainer(tmp_path, max_steps=16, callbacks=[follow, EMA(0.9), NLL(1, 1), keep], enable_checkpointing=True)
    data = small_data()
    trainer.fit(model, data)
    close(follow.seen["validation"], follow.expected)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    close(follow.average, checkpoint["state_dict"])
    close(follow.raw, checkpoint["current_model_state"])
    assert any(not torch.allclose(checkpoint["state_dict"][k], v) for k, v in checkpoint["current_model_state"].items())
    close(follow.average, dict(model.named_parameters()))
    trainer.test(model, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)  # in one process with the fit
    close(follow.seen["test"], follow.average)
    close(follow.average, dict(NeuralDiffusion.load_from_checkpoint(tmp_path / "last.ckpt").named_parameters()))


def test_an_average_may_be_used_for_a_second_fit(tmp_path):
    average = EMA(0.9)
    for _ in range(2):
        model = small_model(lr=1e-2)
        before = copy.deepcopy(model.state_dict())
        small_trainer(tmp_path, callbacks=[average]).fit(model, small_data())
        assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_test_after_a_stopped_fit_measures_what_it_loads(tmp_path):
    follow, keep = Follow(0.9), LastCheckpoint(1)
    keep.dirpath = str(tmp_path)

    class Stop(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4:
                raise RuntimeError("stop")

    model, data = small_model(lr=1e-2), small_data()
    trainer = small_trainer(tmp_path, callbacks=[follow, EMA(0.9), Stop(), keep], enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(model, data)
    trainer.test(model, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    close(follow.seen["test"], follow.average)


def test_ctrl_c_waits_for_the_step_and_is_forgotten_afterwards(tmp_path):
    stop, seen = StopBetweenSteps(), []

    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch_idx)
            if len(seen) == 3:
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    trainer = small_trainer(tmp_path, callbacks=[Interrupt(), stop], accumulate_grad_batches=2)
    with pytest.raises(SystemExit):
        trainer.fit(small_model(), small_data())
    assert seen == [0, 1, 2, 3]
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    trainer = small_trainer(tmp_path, callbacks=[stop])
    trainer.fit(small_model(), small_data())
    assert trainer.global_step == 5


def test_a_checkpoint_of_a_validation_holds_both_sets_of_weights(tmp_path):
    """Saved while the averaged weights are in the model."""
    follow = Follow(0.9)

    class SaveInside(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "inside.ckpt")

    callbacks = [EMA(0.9), follow, SaveInside()]
    small_trainer(tmp_path, max_steps=8, callbacks=callbacks).fit(small_model(lr=1e-2), small_data())
    checkpoint = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    close(follow.expected, checkpoint["state_dict"])
    close(follow.raw, checkpoint["current_model_state"])


def test_mean_and_error():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 + 100
    metric = MeanAndError()
    for part in values.split(77):
        metric.update(part)
    mean, error = metric.compute()
    assert mean.item() == pytest.approx(values.double().mean().item(), rel=1e-9)
    assert error.item() == pytest.approx(values.double().std().item() / 1000**0.5, rel=1e-6)


def evaluate(tmp_path, batch_size, draws=3):
    torch.manual_seed(0)
    model = small_model(process=Gaussian)
    trainer = small_trainer(tmp_path, callbacks=[NLL(test_draws=draws)])
    trainer.test(model, small_data(eval_size=60, eval_batch_size=batch_size), verbose=False)
    return model, {name: value.item() for name, value in trainer.callback_metrics.items()}


def test_the_bound_is_that_of_all_samples_and_draws_whatever_the_batches(tmp_path):
    model, results = evaluate(tmp_path, 60)
    x = small_data(eval_size=60).split("test")
    with torch.no_grad():
        terms = [model.bound(x, indexed_draws(x, torch.arange(60), k, 3)) for k in range(3)]
    nats = torch.stack([term.nats for term in terms]).double()
    assert results["test/nats"] == pytest.approx(nats.mean().item(), rel=1e-5)
    assert results["test/nats_se"] == pytest.approx(nats.mean(0).std().item() / 60**0.5, rel=1e-4)
    assert results["test/bits_per_dim"] == pytest.approx(results["test/nats"] / (2 * math.log(2)), rel=1e-5)
    assert results["test/bits_per_dim_se"] == pytest.approx(results["test/nats_se"] / (2 * math.log(2)), rel=1e-5)
    for name in ("reconstruction", "diffusion", "prior"):
        value = torch.stack([term.named()[name] for term in terms]).mean().item()
        assert results[f"test/{name}_nats"] == pytest.approx(value, rel=1e-4)
    for batch_size in (59, 7):
        assert evaluate(tmp_path, batch_size)[1] == pytest.approx(results, rel=1e-4)


class Spoil(Callback):
    """Makes something not finite at the third step."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != 3:
            return
        if self.what == "data":
            batch[5] = float("nan")
        elif self.what == "weights":
            with torch.no_grad():
                pl_module.reverse.process.network.out.weight[0, 0] = float("inf")

    def on_after_backward(self, trainer, pl_module):
        if self.what == "gradient" and trainer.global_step == 3:
            pl_module.reverse.predictor.network.out.bias.grad[0] = float("nan")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("data", r"step 3: the reconstruction term of NFDM is nan for sample 5 of the batch \(1 of 32 samples\)"),
        ("weights", r"step 3: the diffusion term of NFDM is nan at t=0\.\d+ for sample 0 .*\(32 of 32"),
        ("gradient", r"step 3: the gradient of 'reverse.predictor.network.out.bias' \(NFDM\) is not finite"),
    ],
)
def test_the_first_non_finite_value_stops_the_run_and_is_named(tmp_path, what, message):
    keep = LastCheckpoint(every_n_train_steps=1)
    keep.dirpath = str(tmp_path)
    model = small_model()
    trainer = small_trainer(tmp_path, callbacks=[Spoil(what), HealthCheck(), EMA(), keep], enable_checkpointing=True)
    with pytest.raises(NonFiniteError, match=message):
        trainer.fit(model, small_data())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)  # the last good step
    assert checkpoint["global_step"] == 3
    assert all(value.isfinite().all() for value in checkpoint["current_model_state"].values())


@pytest.mark.parametrize("image", [False, True])
def test_pictures(tmp_path, image):
    settings = {"shape": (1, 8, 8), "decoder_std": None, "process": partial(NDM)} if image else {}
    model = small_model(**settings)
    callbacks = [SampleGrid(9, Heun(4)), Trajectories(9, Heun(4), every_n_epochs=2)]
    trainer = small_trainer(tmp_path, callbacks=callbacks, max_epochs=2, max_steps=-1)
    if image:
        trainer.strategy.connect(model)
        for callback in callbacks:
            callback.on_test_end(trainer, model)
        names = {"samples_test.png", "trajectories_test.png"}
    else:
        trainer.fit(model, small_data())
        names = {"samples_step0000008.png", "samples_step0000016.png", "trajectories_step0000016.png"}
    files = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert files == names
    for name in names:
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert picture.mode == "RGB"
            assert len(picture.getcolors(1_000_000) or range(10)) > 3


@pytest.mark.parametrize(
    "build", [lambda: EMA(1.0), lambda: NLL(0), lambda: SampleGrid(0), lambda: Trajectories(every_n_epochs=0)]
)
def test_settings_that_cannot_work_are_refused(build):
    with pytest.raises(ConfigError):
        build()

"""The LightningModule: checkpoints that rebuild it, settings that cannot work, and the learning rate."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from conftest import small_data, small_model, small_trainer
from nfdm_lightning.callbacks import EMA, LastCheckpoint
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.module import NeuralDiffusion, describe
from nfdm_lightning.networks import ResidualMLP, auto
from nfdm_lightning.predictor import EpsPrediction, LevelPrediction
from nfdm_lightning.processes import NDM, Gaussian, LearnedMonotone, VariancePreserving
from nfdm_lightning.solvers import Heun
from nfdm_lightning.volatility import MatchedVolatility

FLOAT32 = True

tiny = partial(ResidualMLP, width=8, depth=1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"process": partial(NDM, network=tiny, schedule=partial(VariancePreserving, gamma_min=-8.0)), "lr": 3e-4},
        {"process": partial(Gaussian, schedule=LearnedMonotone), "volatility": MatchedVolatility},
        {"predictor": EpsPrediction, "process": Gaussian},
        {
            "shape": (1, 4, 4),
            "levels": 5,
            "decoder_std": None,
            "process": partial(NDM, network=tiny),
            "predictor": partial(LevelPrediction, network=tiny),
        },
    ],
)
def test_a_checkpoint_alone_rebuilds_a_model_made_in_python(tmp_path, settings):
    model = small_model(**settings)
    trainer = small_trainer(tmp_path)
    trainer.strategy.connect(model)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["lr"] == model.hparams["lr"]
    again = NeuralDiffusion.load_from_checkpoint(path)
    assert again.hparams["process"] == model.hparams["process"]
    for (name, value), (other, copy) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(value, copy)
    draw = [m.eval().sample(3, Heun(6), torch.Generator().manual_seed(0))[0] for m in (model, again)]
    assert torch.equal(*draw)
    trainer.strategy.connect(again)  # and what was loaded can be saved and loaded again
    trainer.save_checkpoint(path)
    assert NeuralDiffusion.load_from_checkpoint(path).hparams["process"] == model.hparams["process"]


def test_parts_that_cannot_be_written_down_are_refused():
    for part in (lambda shape: None, nn.Linear(2, 2), partial(NDM, network=partial(auto, out_shape=(2,)))):
        with pytest.raises(ConfigError, match=r"cannot be written into a checkpoint|is a function"):
            small_model(process=part)
    assert describe(auto) == "nfdm_lightning.networks.auto"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": None}, "model.shape=None"),
        ({"shape": (2, 3)}, "no event shape"),
        ({"data_std": None}, "model.data_std=None"),
        ({"data_std": 0.0}, "model.data_std=0.0"),
        ({"levels": 17}, "decoder_std=0.01 is for continuous data, but these have 17 levels"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        small_model(**settings)


def test_a_batch_of_another_shape_is_refused():
    with pytest.raises(ConfigError, match=r"data of shape \(2,\), got a batch of \(4, 3\)"):
        small_model().bound(torch.zeros(4, 3))


def test_samples_come_in_the_range_of_the_data():
    model = small_model(
        shape=(1, 4, 4),
        levels=5,
        decoder_std=None,
        process=partial(NDM, network=tiny),
        predictor=partial(LevelPrediction, network=tiny),
    )
    samples, solution = model.sample(6, Heun(4), torch.Generator().manual_seed(0))
    assert samples.shape == (6, 1, 4, 4)
    assert solution.nfe == 4
    assert torch.isin((samples + 1) * 2, torch.arange(5.0)).all()


def test_learning_rate_warms_up_falls_and_follows_the_user_on_resume(tmp_path):
    rates = []

    class Model(NeuralDiffusion):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.optimizers().param_groups[0]["lr"])

    def build(lr):
        base = small_model(lr=lr, warmup_steps=4)
        base.__class__ = Model
        return base

    keep = LastCheckpoint(every_n_train_steps=10)
    keep.dirpath = str(tmp_path)
    small_trainer(tmp_path, max_steps=20, callbacks=[keep], enable_checkpointing=True).fit(build(1e-2), small_data())
    assert rates[:4] == pytest.approx([0.25e-2, 0.5e-2, 0.75e-2, 1e-2], rel=0.1)
    assert rates[-1] < 0.03e-2
    del rates[:]
    small_trainer(tmp_path, max_steps=40).fit(build(2e-2), small_data(), ckpt_path=tmp_path / "last.ckpt")
    assert len(rates) == 20
    assert rates[0] == pytest.approx(2e-2 * (0.01 + 0.99 * 0.5), rel=0.05)


def test_an_optimiser_with_its_groups_in_the_older_order_continues(tmp_path):
    keep = LastCheckpoint(every_n_train_steps=10)
    keep.dirpath = str(tmp_path)
    small_trainer(tmp_path, max_steps=3, callbacks=[keep], enable_checkpointing=True).fit(small_model(), small_data())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["optimizer_states"][0]["param_groups"].reverse()
    torch.save(checkpoint, tmp_path / "older.ckpt")
    ends = []
    for name in ("last", "older"):
        model = small_model()
        small_trainer(tmp_path, max_steps=6).fit(model, small_data(), ckpt_path=tmp_path / f"{name}.ckpt")
        ends.append(model.state_dict())
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["name"] == "reverse"
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_accumulation_draws_new_numbers_for_every_batch(tmp_path):
    times = []

    class Model(NeuralDiffusion):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            times.append(self.last_terms.t.sort().values[0].item())
            return loss

    model = small_model()
    model.__class__ = Model
    small_trainer(tmp_path, max_steps=4, accumulate_grad_batches=2, callbacks=[EMA()]).fit(model, small_data())
    assert len(set(times)) == 8


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_rounded_times_are_refused(tmp_path, precision):
    with pytest.raises(ConfigError, match=f"trainer.precision={precision} rounds the times.*use bf16-mixed"):
        small_trainer(tmp_path, precision=precision).fit(small_model(), small_data())


@pytest.mark.parametrize(
    ("strategy", "way_out"),
    [
        (FSDPStrategy, "FSDPStrategy flattens the weights.*use ModelParallelStrategy, .* or ddp"),
        (ModelParallelStrategy, "add --trainer.strategy.save_distributed_checkpoint=false"),
    ],
)
def test_strategies_that_do_not_fit_are_refused(strategy, way_out):
    model = small_model()
    model._trainer = SimpleNamespace(strategy=strategy(), precision_plugin=None)
    with pytest.raises(ConfigError, match=way_out):
        model.setup("fit")

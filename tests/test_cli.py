"""The command line, through its own entry point: what works as typed, the silent traps, and one line for every error."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import CONFIGS
from nfdm_lightning.cli import main
from nfdm_lightning.module import NeuralDiffusion

FLOAT32 = True

TOY = str(CONFIGS / "toy2d_nfdm.yaml")
SMALL = [
    "--trainer.max_steps=3",
    "--trainer.callbacks=null",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.num_sanity_val_steps=0",
    "--data.train_size=64",
    "--data.eval_size=16",
    "--data.batch_size=16",
    "--nll.draws=1",
    "--nll.test_draws=2",
]
FIT = ["fit", "--config", TOY, *SMALL]
RUN = Path("runs/toy2d_nfdm")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder to copy."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    assert main(FIT) == 0
    os.chdir(before)
    return folder / "runs"


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / RUN


def error(args: list[str], capsys, status: int = 2) -> str:
    """Runs a command that must fail with one line; returns it."""
    capsys.readouterr()
    assert main(args) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def config_of(args: list[str], capsys) -> dict:
    capsys.readouterr()
    assert main([*args, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_fit_leaves_a_run_that_test_predict_validate_and_sample_use(run, capsys):
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt"}
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 3
    assert main(["test", "--config", TOY, *SMALL, "--ckpt_path=last"]) == 0
    printed = capsys.readouterr().out
    results = json.loads((run / "checkpoints" / "last.test.json").read_text())["metrics"]
    assert f"test bits/dim: {results['test/bits_per_dim']:.4f} +- {results['test/bits_per_dim_se']:.4f}" in printed
    assert results["test/nats"] == pytest.approx(
        sum(results[f"test/{name}_nats"] for name in ("reconstruction", "diffusion", "prior")), rel=1e-5
    )
    assert main(["validate", "--config", TOY, *SMALL, "--ckpt_path=last"]) == 0
    assert "val/bits_per_dim" in capsys.readouterr().out
    assert main(["predict", "--config", TOY, *SMALL, "--ckpt_path=last"]) == 0
    predictions = np.load(run / "predictions_rank0.npz")
    assert predictions["index"].tolist() == list(range(16))
    assert np.isfinite(predictions["nats"]).all()


@pytest.mark.parametrize(
    "solver", [[], ["--solver=Heun", "--solver.nfe=6"], ["--solver=EulerMaruyama", "--solver.stochasticity=0.5"]]
)
def test_sample(run, solver, capsys):
    args = ["sample", f"--ckpt_path={run}/checkpoints/last.ckpt", "--number=5", *solver]
    assert main([*args, "--out=a", "--seed=1", "--trajectories=true"]) == 0
    assert main([*args, "--out=b", "--seed=1"]) == 0
    assert main([*args, "--out=c", "--seed=2"]) == 0
    first, second, other = (np.load(f"{name}/samples.npy") for name in "abc")
    assert first.shape == (5, 2)
    assert first.dtype == np.float32
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    for name in ("samples.png", "trajectories.png"):
        with Image.open(f"a/{name}") as picture:
            assert picture.size[0] > 100
    assert {path.name for path in Path("a").iterdir()} == {"samples.png", "samples.npy", "trajectories.png"}
    out = capsys.readouterr().out
    assert f"{6 if solver[:1] == ['--solver=Heun'] else 100} function evaluations each: a" in out


@pytest.mark.parametrize(
    "args",
    [
        ["--trainer.overfit_batches=2"],
        ["--trainer.callbacks=SampleGrid"],
        ["--trainer.reload_dataloaders_every_n_epochs=1"],
        ["--trainer.fast_dev_run=true"],
        ["--trainer.enable_checkpointing=false"],
        ["--trainer.logger=false"],
        ["--trainer.precision=64"],
        ["--trainer.precision=bf16-mixed"],
        ["--trainer.accumulate_grad_batches=2"],
        ["--data.num_workers=1"],
    ],
)
@pytest.mark.parametrize("config", ["toy2d_nfdm", "digits_nfdm"])
def test_settings_of_the_trainer(config, args, capsys):
    few = [arg for arg in SMALL if config != "digits_nfdm" or not arg.startswith("--data.")]
    assert main(["fit", "--config", str(CONFIGS / f"{config}.yaml"), *few, *args]) == 0


def test_sample_of_discrete_data_are_levels_that_files_reads_again(capsys):
    assert main(["fit", "--config", str(CONFIGS / "digits_gaussian.yaml"), *SMALL[:6], "--trainer.max_steps=1"]) == 0
    assert main(["sample", "--ckpt_path=runs/digits_gaussian/checkpoints/last.ckpt", "--number=20", "--solver.nfe=3"]) == 0
    array = np.load("runs/digits_gaussian/samples/samples.npy")
    assert array.dtype == np.uint8
    assert array.shape == (20, 1, 8, 8)
    assert array.max() <= 16
    from nfdm_lightning.data import Files

    assert Files("runs/digits_gaussian/samples/samples.npy", levels=17).shape == (1, 8, 8)


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "sample", "likelihood"):
        assert f"    {command} " in out
    assert main(["sample", "--help"]) == 0
    assert "--solver" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["lightning"], ["nfdm"], [sys.executable, "-m", "nfdm_lightning"]])
def test_installed_commands(command):
    script = Path(sys.executable).parent / command[0]
    program = [str(script)] if len(command) == 1 else command
    done = subprocess.run([*program, "fit", "--modle.lr=1"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "there is no 'modle'; did you mean model?" in done.stderr
    assert "Traceback" not in done.stderr


# single names: subclasses that other test files define are listed between them
@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (
            ["--model.process=NFMD"],
            ["model.process: there is no 'NFMD'", "did you mean NFDM", "Bridge", "FlowNFDM", "Gaussian", "MuLAN"],
        ),
        (["--model.process.detla=1"], ["'detla' is not an argument there", "did you mean delta", "bound, delta, network"]),
        (["--model.lrr=1"], ["there is no 'model.lrr'", "did you mean lr", "predictor, process", "volatility"]),
        (["--modle.lr=1"], ["there is no 'modle'", "did you mean model", "data", "trainer"]),
        (["--data=Toy3D"], ["data: there is no 'Toy3D'", "Digits", "FashionMNIST", "Files", "Pairs", "Toy2D"]),
        (["--data.batchsize=1"], ["'batchsize'", "did you mean batch_size"]),
        (
            ["--data.distribution=Spiral"],
            ["distribution: there is no 'Spiral'", "Checkerboard", "EightGaussians", "Pinwheel"],
        ),
        (
            ["--model.predictor=YPrediction"],
            ["there is no 'YPrediction'", "EpsPrediction", "LevelPrediction", "VPrediction"],
        ),
        (["--model.process.network=MPL"], ["network: there is no 'MPL'", "ResidualMLP, UNet"]),
        (["--model.process=myplug.My"], ["no module 'myplug' in the working directory"]),
        (["--model.lr=abc"], ["model.lr", "float", "abc"]),
        (["--model.process.delta=2"], ["delta=2", "must lie in (0, 1)"]),
        (["--data.batch_size=1000"], ["data.batch_size=1000 is more than the 64 training samples"]),
        (["--trainer.max_steps=x"], ["trainer.max_steps"]),
        (["--ema.decay=2"], ["ema.decay=2", "[0, 1)"]),
        (["--ckpt_path=last"], ["--ckpt_path=last: there is no", "holds no checkpoints", "--trainer.default_root_dir"]),
        (["--ckpt_path=a.ckpt"], ["--ckpt_path=a.ckpt: there is no a.ckpt"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(args, parts, capsys):
    line = error([*FIT, *args], capsys)
    for part in parts:
        assert part in line
    assert not list(Path().rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model:\n  procss:\n    class_path: NDM\n", ["there is no 'model.procss'", "did you mean process"]),
        ("modell:\n  lr: 1\n", ["there is no 'modell'", "did you mean model"]),
        ("model:\n  process:\n    class_path: NFDM\n    init_args: {detla: 3}\n", ["'detla'", "did you mean delta"]),
        ("trainer:\n  callbacks:\n  - class_path: SampelGrid\n", ["'SampelGrid'", "did you mean SampleGrid"]),
        ("model:\n  lr: ${nope.x}\n", ["nope.x", "model.lr"]),
        ("model:\n  lr: [\n", ["parsing"]),
    ],
)
def test_a_mistake_in_a_file_is_one_line_too(text, parts, capsys):
    Path("mine.yaml").write_text(text)
    line = error([*FIT, "--config=mine.yaml"], capsys)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["fitt"], "invalid choice: 'fitt'"),
        ([], "fit,validate,test,predict,sample"),
        (["fit", "--config=nope.yaml"], "nope.yaml"),
        (["test", "--config", TOY], "test needs a checkpoint"),
        (["sample", "--ckpt_path=nope.ckpt"], "nope.ckpt: there is no such file"),
        (["sample", "--ckpt_path=nope.ckpt", "--solver=Hoin"], "there is no 'Hoin'"),
        (["sample", "--ckpt_path=nope.ckpt", "--solver=Heun", "--solver.nfe=1"], "nfe=1 is less than the 2"),
        (["sample", "--ckpt_path=nope.ckpt", "--nfe=1"], "there is no 'nfe'"),
        (["sample", "--ckpt_path={run}/checkpoints/last.ckpt", "--device=nope"], "--device=nope cannot be used"),
    ],
)
def test_other_mistakes(args, part, run, capsys):
    assert part in error([arg.format(run=run) for arg in args], capsys)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([*FIT, "--data.batch_size=0"], "batch_size=0"),
        (["likelihood", f"--ckpt_path={RUN}/checkpoints/last.ckpt", "--data=Toy2D", "--data.batch_size=0"], "batch_size=0"),
        (["sample", f"--ckpt_path={RUN}/checkpoints/last.ckpt", "--solver.nfe=0"], "nfe=0"),
    ],
)
def test_what_a_part_refuses_when_it_is_built_is_one_line_too(args, part, run, capsys):
    message = error(args, capsys)
    assert part in message
    assert "Namespace" not in message


def test_damaged_and_foreign_checkpoints(run, capsys):
    good = run / "checkpoints" / "last.ckpt"
    Path("cut.ckpt").write_bytes(good.read_bytes()[:5000])
    Path("text.ckpt").write_text("hello")
    torch.save({"weights": torch.zeros(1)}, "other.ckpt")
    for name in ("cut", "text", "other"):
        assert f"{name}.ckpt" in error(["test", "--config", TOY, f"--ckpt_path={name}.ckpt"], capsys)
        assert f"{name}.ckpt" in error(["sample", f"--ckpt_path={name}.ckpt"], capsys)
    line = error(["test", "--config", TOY, *SMALL, "--model.process=Gaussian", f"--ckpt_path={good}"], capsys)
    assert "the checkpoint is of another model" in line


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_a_pickle_in_a_checkpoint_is_not_executed(capsys):
    torch.save({"hyper_parameters": {}, "state_dict": {}, "x": Malicious()}, "bad.ckpt")
    for args in (["sample", "--ckpt_path=bad.ckpt"], ["fit", "--config", TOY, *SMALL, "--ckpt_path=bad.ckpt"]):
        assert "bad.ckpt" in error(args, capsys)
    assert not Path("owned").exists()


# The silent traps of the libraries underneath, one by one.


def test_a_swapped_plugin_takes_its_own_defaults_and_kept_values_are_told(capsys):
    swapped = config_of(["fit", "--config", str(CONFIGS / "toy2d_gaussian.yaml"), "--model.process=NFDM"], capsys)
    process = swapped["model"]["process"]
    assert process["class_path"].endswith("NFDM")
    assert process["init_args"]["delta"] == 0.01
    assert "schedule" not in process["init_args"]
    with pytest.warns(UserWarning, match=r"model.process: NDM keeps network=ResidualMLP of the NFDM in .*toy2d_nfdm.yaml"):
        assert main([*FIT, "--model.process=NDM"]) == 0
    shutil.rmtree("runs")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*keeps.*")
        assert main(FIT) == 0


def test_flags_win_over_the_checkpoint_and_the_checkpoint_over_defaults(run, capsys):
    model = run / "checkpoints" / "last.ckpt"
    bare = ["fit", "--data=Toy2D", f"--ckpt_path={model}", *SMALL[:-5]]
    # not given by the user: from the checkpoint
    kept = config_of_resumed([*bare, "--trainer.max_steps=4", "--data.train_size=600"])
    assert kept["model"]["lr"] == 2e-3
    assert kept["model"]["process"]["init_args"]["network"]["init_args"]["width"] == 64
    # given: as the user says, though the checkpoint says otherwise
    said = config_of_resumed([*bare, "--trainer.max_steps=4", "--data.train_size=600", "--model.lr=5e-4"])
    assert said["model"]["lr"] == 5e-4


def config_of_resumed(args: list[str]) -> dict:
    shutil.rmtree("resumed", ignore_errors=True)
    assert main([*args, "--trainer.default_root_dir=resumed"]) == 0
    return yaml.safe_load(Path("resumed/config_resumed.yaml").read_text())


def test_last_means_the_last_of_this_folder_and_nothing_starts_from_scratch(run, capsys):
    assert main([*FIT, "--ckpt_path=last", "--trainer.max_steps=5"]) == 0
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    line = error([*FIT, "--ckpt_path=last", "--trainer.default_root_dir=elsewhere"], capsys)
    assert "there is no elsewhere/checkpoints/last.ckpt" in line
    assert not Path("elsewhere").exists()


def test_the_last_checkpoint_does_not_go_stale_beside_the_best(capsys):
    args = ["--trainer.max_steps=12", "--trainer.check_val_every_n_epoch=1", "--model.lr=1.0", "--model.warmup_steps=1000"]
    assert main([*FIT, *args]) == 0
    folder = RUN / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 12


def test_a_new_run_never_overwrites_another(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    line = error([*FIT, "--model.lr=1e-4"], capsys)
    assert f"{RUN} already holds a run" in line
    assert "--ckpt_path=last" in line
    (run / "checkpoints" / "last.ckpt").rename(run / "checkpoints" / "best.ckpt")
    assert "already holds a run" in error(FIT, capsys)
    before.pop(run / "checkpoints" / "last.ckpt")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_that_fails_early_leaves_no_configuration_and_can_be_tried_again(capsys):
    assert error([*FIT, "--data.batch_size=1000"], capsys)
    assert not (RUN / "config.yaml").exists()
    assert main(FIT) == 0


def test_the_shape_comes_from_the_data(run):
    model = NeuralDiffusion.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert model.hparams["shape"] == (2,)
    assert model.hparams["levels"] is None
    assert model.hparams["data_std"] == pytest.approx(2.0310, abs=1e-4)
    assert model.reverse.predictor.network.inp.in_features == 2


def test_data_without_a_shape_are_refused(capsys):
    Path("mydata.py").write_text("from nfdm_lightning.data import Toy2D\n\n\nclass Shapeless(Toy2D):\n    shape = None\n")
    assert "model.shape=None" in error(["fit", "--config", TOY, "--data=mydata.Shapeless"], capsys)


def test_a_users_own_plugin_in_the_working_directory(capsys):
    Path("myplugins.py").write_text(
        "from nfdm_lightning.processes import NFDM\n\n\nclass MyProcess(NFDM):\n"
        '    """Mine."""\n\n    def start(self, eps, x):\n        return super().start(eps, x)\n'
    )
    sys.modules.pop("myplugins", None)
    assert main([*FIT, "--model.process=myplugins.MyProcess"]) == 0
    assert main(["sample", f"--ckpt_path={RUN}/checkpoints/last.ckpt", "--number=2", "--solver.nfe=2"]) == 0
    model = NeuralDiffusion.load_from_checkpoint(RUN / "checkpoints" / "last.ckpt")
    assert type(model.reverse.process).__name__ == "MyProcess"


def test_interpolation_across_sections_follows_the_command_line(capsys):
    Path("mine.yaml").write_text("model:\n  warmup_steps: ${data.init_args.batch_size}\n")
    assert config_of([*FIT, "--config=mine.yaml", "--data.batch_size=32"], capsys)["model"]["warmup_steps"] == 32


def test_small_numbers_are_numbers(capsys):
    Path("mine.yaml").write_text("model:\n  lr: 1e-4\n")
    assert config_of(["fit", "--config", TOY, "--config=mine.yaml"], capsys)["model"]["lr"] == 1e-4


def test_a_non_finite_loss_is_one_line_and_status_one(capsys):
    line = error([*FIT, "--model.lr=1e30", "--model.warmup_steps=0", "--trainer.gradient_clip_val=null"], capsys, 1)
    assert "term of NFDM is" in line or "gradient of" in line


BRIDGE = ["--config", str(CONFIGS / "toy2d_bridge.yaml"), *[arg for arg in SMALL if "_size" not in arg]]
BRIDGE += ["--data.target.train_size=64", "--data.target.eval_size=16", "--data.source.train_size=64"]
BRIDGE += ["--data.source.eval_size=16", "--data.batch_size=16"]


def test_a_bridge_is_trained_and_sampled_from_real_sources(capsys):
    assert main(["fit", *BRIDGE]) == 0
    checkpoint = "--ckpt_path=runs/toy2d_bridge/checkpoints/last.ckpt"
    few = [checkpoint, "--number=20", "--batch_size=8", "--solver.nfe=2", "--trajectories=true"]
    assert main(["sample", *few]) == 0  # the sources of the run's own data
    first = np.load("runs/toy2d_bridge/samples/samples.npy")
    assert first.shape == (20, 2)
    assert main(["sample", *few, "--source=Toy2D", "--source.distribution=TwoMoons", "--out=moons"]) == 0
    assert not np.allclose(np.load("moons/samples.npy"), first)
    assert {file.name for file in Path("moons").iterdir()} == {"samples.npy", "samples.png", "trajectories.png"}
    (Path("runs/toy2d_bridge") / "config.yaml").unlink()
    assert "to say what data it is of: give them with --source=" in error(["sample", *few], capsys)
    assert "there is no 'Nothing'" in error(["sample", *few, "--source=Nothing"], capsys)


def test_a_bridge_without_pairs_and_pairs_without_a_bridge_are_refused(run, capsys):
    message = error([*FIT, "--model.process=Bridge", "--trainer.default_root_dir=a"], capsys)
    assert "Bridge is a bridge and needs pairs of data and source: use --data=Pairs" in message
    message = error(["fit", *BRIDGE, "--model.process=NFDM", "--trainer.default_root_dir=b"], capsys)
    assert "NFDM is not a bridge, but the data are pairs" in message
    message = error(["sample", f"--ckpt_path={run}/checkpoints/last.ckpt", "--source=Toy2D"], capsys)
    assert "NFDM is not a bridge, it starts from noise" in message


def test_penalties_and_discrete_time_are_settings(run, capsys):
    """In the checkpoint too: what test measures is the bound of what was trained."""
    args = [*FIT, "--model.penalties+=Curvature", "--model.penalties+=Obstacle", "--model.penalties.radius=0.3"]
    args += ["--model.discrete_steps=7", "--trainer.default_root_dir=new"]
    assert main(args) == 0
    loaded = NeuralDiffusion.load_from_checkpoint("new/checkpoints/last.ckpt", weights_only=True)
    assert [type(penalty).__name__ for penalty in loaded.penalties] == ["Curvature", "Obstacle"]
    assert loaded.penalties[1].radius == 0.3
    assert loaded.discrete_steps == 7
    assert main(["test", *FIT[1:], "--ckpt_path=new/checkpoints/last.ckpt", "--trainer.default_root_dir=new"]) == 0
    message = error([*FIT, "--model.penalties+=Curvatur", "--trainer.default_root_dir=c"], capsys)
    assert "there is no 'Curvatur'" in message
    message = error([*FIT, "--model.process=FlowNFDM", "--model.discrete_steps=5", "--trainer.default_root_dir=d"], capsys)
    assert "FlowNFDM is not affine in the noise" in message
    assert "must be at least 1" in error([*FIT, "--model.discrete_steps=0", "--trainer.default_root_dir=e"], capsys)

"""Two processes that share out the weights (ModelParallelStrategy) on the CPU: what they learn is what DDP learns."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from socket import socket
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import CONFIGS, small_data, small_trainer
from nfdm_lightning.callbacks import NLL
from nfdm_lightning.cli import main
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.sharding import shard

FLOAT32 = True

# Starting two processes takes longer than what they do: one start for all runs.
RANKS = """
import json, sys, torch
torch.set_num_threads(1)
from functools import partial
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.tensor import DTensor
from nfdm_lightning.callbacks import EMA, NLL, HealthCheck, LastCheckpoint, SampleGrid
from nfdm_lightning.cli import main
from nfdm_lightning.data import Toy2D
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.networks import ResidualMLP
from nfdm_lightning.predictor import XPrediction
from nfdm_lightning.processes import NFDM, Curvature, Obstacle
from nfdm_lightning.solvers import Ancestral

rank, toy2d = int(sys.argv[1]), sys.argv[2]

def model(penalty):
    torch.manual_seed(7 * rank)  # rank 0 has the say
    network = partial(ResidualMLP, width=33, depth=2)
    built = NeuralDiffusion((2,), data_std=2.0, decoder_std=0.01, lr=1e-2, warmup_steps=1, decay="constant",
        process=partial(NFDM, network=network), predictor=partial(XPrediction, network=network), penalties=[penalty])
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built

def shares(tensors):
    return sum(t.to_local().numel() for t in tensors), sum(t.numel() for t in tensors)

class Look(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            gradients = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
                for n, p in pl_module.named_parameters()}
            if rank == 0:
                torch.save(gradients, f"{trainer.default_root_dir}.gradients")

    def on_train_end(self, trainer, pl_module):
        if isinstance(trainer.strategy, ModelParallelStrategy):
            average = trainer.callbacks[0]._average_model.module
            states = trainer.optimizers[0].state.values()
            found = {"weights": shares(list(pl_module.reverse.predictor.network.parameters())),
                "all": shares(list(pl_module.parameters())), "average": shares(list(average.parameters())),
                "moments": shares([state["exp_avg"] for state in states])}
            with open(f"{trainer.default_root_dir}.shares{rank}", "w") as file:
                json.dump(found, file)

def run(name, sharded, steps, ckpt=None, penalty=Obstacle):
    strategy = ModelParallelStrategy(save_distributed_checkpoint=False) if sharded else DDPStrategy()
    last = LastCheckpoint()
    last.dirpath = name
    # rank 0 evaluates three batches and rank 1 two; only rank 0 draws
    data = Toy2D(train_size=256, eval_size=65, batch_size=16, eval_batch_size=16)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=steps, default_root_dir=name, logger=False,
        callbacks=[EMA(0.5), NLL(draws=1, test_draws=1), HealthCheck(), last, SampleGrid(4, Ancestral(2)), Look()],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1, val_check_interval=2,
        gradient_clip_val=0.05)
    trainer.fit(model(penalty), data, ckpt_path=ckpt)
    return trainer, data

def metrics(trainer, name):
    if rank == 0:
        with open(name, "w") as file:
            json.dump({key: float(value) for key, value in trainer.callback_metrics.items()}, file)

if __name__ == "__main__":
    for name, sharded in (("ddp", False), ("fsdp", True)):
        trainer, data = run(name, sharded, 4)
        metrics(trainer, f"{name}.val")
    trainer.test(trainer.lightning_module, data, ckpt_path="ddp/last.ckpt")
    metrics(trainer, "fsdp.test")
    run("ddp_from_fsdp", False, 6, "fsdp/last.ckpt")
    run("fsdp_from_ddp", True, 6, "ddp/last.ckpt")
    run("ddp_curvature", False, 2, penalty=Curvature)
    run("fsdp_curvature", True, 2, penalty=Curvature)
    args = ["--config", toy2d, "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.default_root_dir=cli",
        "--trainer.strategy=ModelParallelStrategy", "--trainer.check_val_every_n_epoch=1", "--trainer.callbacks=null",
        "--trainer.enable_progress_bar=false", "--data.train_size=256", "--data.eval_size=32", "--data.batch_size=16",
        "--nll.draws=1", "--nll.test_draws=1"]
    assert main(["fit", *args, "--trainer.max_steps=10"]) == 0  # and stores the best weights amid it
    assert main(["test", *args, "--ckpt_path=last"]) == 0
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left what they found."""
    folder = tmp_path_factory.mktemp("fsdp")
    (folder / "ranks.py").write_text(RANKS)
    with closing(socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in (0, 1):
        places = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "ranks.py", str(rank), str(CONFIGS / "toy2d_nfdm.yaml")]
        with open(folder / f"screen{rank}", "w") as screen:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "NFDM_TRACEBACK": "1", **places}
            started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=screen, stderr=screen))
    try:
        codes = [process.wait(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 0], "".join((folder / f"screen{rank}").read_text()[-3000:] for rank in (0, 1))
    return folder


def checkpoint(folder: Path, run: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / run / "last.ckpt", weights_only=True)
    return found


def assert_same_state(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Weights, their average, and what the optimiser knows."""
    for key in ("state_dict", "current_model_state", "averaging_state"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-6)
    for one_optimiser, two_optimiser in zip(one["optimizer_states"], two["optimizer_states"], strict=True):
        for one_group, two_group in zip(one_optimiser["param_groups"], two_optimiser["param_groups"], strict=True):
            assert one_group | {"betas": None} == two_group | {"betas": None}  # a tuple, or a list of the same
        torch.testing.assert_close(one_optimiser["state"], two_optimiser["state"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("suffix", ["", "_curvature"])
def test_shared_out_weights_learn_what_whole_ones_do(ranks, suffix):
    one, two = (torch.load(ranks / f"{run}{suffix}.gradients", weights_only=True) for run in ("ddp", "fsdp"))
    assert torch.nn.utils.get_total_norm(one.values()) > 0.5  # clipped to 0.05
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    ddp, fsdp = checkpoint(ranks, f"ddp{suffix}"), checkpoint(ranks, f"fsdp{suffix}")
    assert any((ddp["state_dict"][name] - value).abs().max() > 1e-3 for name, value in ddp["current_model_state"].items())
    assert_same_state(ddp, fsdp)


@pytest.mark.parametrize("run", ["fsdp", "fsdp_curvature"])
def test_every_process_keeps_its_share_only(ranks, run):
    first, second = (json.loads((ranks / f"{run}.shares{rank}").read_text()) for rank in (0, 1))
    for what, (own, total) in first.items():
        assert own + second[what][0] == total, what
        assert 0.5 <= own / total < 0.55, what  # 17 and 16 of 33


def test_evaluation_is_that_of_whole_weights(ranks, tmp_path):
    ddp, fsdp = (json.loads((ranks / f"{run}.val").read_text()) for run in ("ddp", "fsdp"))
    assert ddp.keys() == fsdp.keys()
    assert fsdp == pytest.approx(ddp, rel=1e-5)
    assert {path.name for path in (ranks / "fsdp" / "pictures").iterdir()} >= {"samples_test.png"}
    model = NeuralDiffusion.load_from_checkpoint(ranks / "fsdp" / "last.ckpt")
    trainer = small_trainer(tmp_path, callbacks=[NLL(test_draws=1)])
    trainer.test(model, small_data(eval_size=65), verbose=False)
    alone = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert json.loads((ranks / "fsdp.test").read_text()) == pytest.approx(alone, rel=1e-4)


def test_a_run_continues_with_the_other_strategy(ranks):
    one, two = checkpoint(ranks, "ddp_from_fsdp"), checkpoint(ranks, "fsdp_from_ddp")
    assert one["global_step"] == two["global_step"] == 6
    assert one["optimizer_states"][0]["state"][0]["step"] == 6
    assert_same_state(one, two)


def test_the_command_line_shares_out_and_tests_alone(ranks, monkeypatch):
    monkeypatch.chdir(ranks)
    report = ranks / "cli" / "checkpoints" / "last.test.json"
    assert (ranks / "cli" / "checkpoints" / "best.ckpt").is_file()
    two = json.loads(report.read_text())["metrics"]
    args = ["--config", str(CONFIGS / "toy2d_nfdm.yaml"), "--trainer.accelerator=cpu", "--trainer.default_root_dir=cli"]
    args += ["--trainer.callbacks=null", "--trainer.enable_progress_bar=false"]
    args += ["--data.train_size=256", "--data.eval_size=32", "--nll.test_draws=1"]
    assert main(["test", *args, "--ckpt_path=last"]) == 0
    one = json.loads(report.read_text())["metrics"]
    assert two["test/bits_per_dim"] == pytest.approx(one["test/bits_per_dim"], rel=1e-4)


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def test_scalars_cannot_be_shared_out():
    with pytest.raises(ConfigError, match=r"scalar parameter 'scale': give it the shape \(1,\), or use ddp"):
        shard(Scalar(), None, (), torch.device("cpu"))

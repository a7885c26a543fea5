import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import CONFIGS
from nfdm_lightning.cli import main
from nfdm_lightning.errors import ConfigError, NonFiniteError
from nfdm_lightning.evaluation import _Batches, _Shelf

FLOAT32 = True

RUN = "runs/digits"
CHECKPOINT = f"{RUN}/checkpoints/last.ckpt"
FIT = [
    "fit",
    f"--config={CONFIGS / 'digits_nfdm.yaml'}",
    "--trainer.max_steps=2",
    "--trainer.limit_val_batches=0",
    "--trainer.accelerator=cpu",
    "--trainer.callbacks=null",
    "--trainer.enable_progress_bar=false",
    f"--trainer.default_root_dir={RUN}",
    "--data.batch_size=4",
    "--model.predictor.network.channels=8",
    "--model.process.network.width=8",
]
FEW = [
    "likelihood",
    f"--ckpt_path={CHECKPOINT}",
    "--number=3",
    "--accelerator=cpu",
    "--progress=false",
    "--bound.draws=2",
    "--iw.samples=2",
    "--iw.steps=3",
    "--ode.method=euler",
    "--ode.steps=2",
    "--consistency.samples=8",
    "--consistency.nfe=4",
    "--consistency.times=2",
    "--guard=2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likelihood")
    before = Path.cwd()
    os.chdir(folder)
    assert main(FIT) == 0
    yield folder
    os.chdir(before)


def report(folder: Path, name: str = "last.likelihood_test.json") -> dict:
    return json.loads((folder / RUN / "checkpoints" / name).read_text())


def test_one_table_and_one_report(folder, capsys):
    assert main([*FEW, "--estimators=bound,iw,ode"]) == 0
    out = capsys.readouterr().out
    assert "UNTRUSTED ode: a finer solve differs by" in out
    assert "marginals of SDE and ODE" in out
    assert "trained with flip=False" in out
    found = report(folder)
    assert [one["estimator"] for one in found["estimates"]] == ["bound", "iw", "ode"]
    assert [one["of"] for one in found["estimates"]] == ["SDE", "SDE in 3 steps", "ODE"]
    assert [one["nfe"] for one in found["estimates"]] == [2, 6, 2]
    for one in found["estimates"]:
        assert one["bits_per_dim"] == pytest.approx(one["nats"] / 64 / 0.6931471805599453)
        assert one["dequantisation"] == "none: discrete decoder over 17 levels"
        assert one["bits_per_dim_se"] > 0
    bound = found["estimates"][0]
    assert sum(bound["parts_nats"].values()) == pytest.approx(bound["nats"])
    trust = found["estimates"][2]["trust"]
    assert trust["trusted"] is False
    assert trust["samples"] == 2
    assert found["samples"] == 3
    assert found["likelihood"] == "-log p(x)"
    assert found["data"]["checksum"] == found["training"]["data"]["checksum"]
    assert found["checkpoint"]["weights"] == "average (EMA)"
    assert [gap["t"] for gap in found["marginals"]["gaps"]] == [0.0, 0.5]
    assert not list((folder / RUN / "checkpoints").glob("*.partial*"))


def test_the_bound_is_that_of_lightning_test(folder, capsys):
    assert main([*FEW, "--estimators=bound", "--number=null", "--guard=0", "--consistency.samples=0"]) == 0
    ours = report(folder)["estimates"][0]
    assert report(folder)["marginals"]["gaps"] == []
    args = ["test", f"--config={RUN}/config.yaml", f"--ckpt_path={CHECKPOINT}", "--nll.test_draws=2"]
    assert main([*args, "--trainer.enable_progress_bar=false"]) == 0
    theirs = report(folder, "last.test.json")["metrics"]
    assert ours["bits_per_dim"] == pytest.approx(theirs["test/bits_per_dim"], rel=1e-5)


def test_a_finer_solve_that_fails_leaves_the_result_untrusted(folder, monkeypatch, capsys):
    from nfdm_lightning import evaluation

    def fails(*_):
        raise NonFiniteError("diverged")

    monkeypatch.setattr(evaluation, "check_trust", fails)
    assert main([*FEW, "--estimators=ode", "--out=untrusted.json", "--consistency.samples=0"]) == 0
    assert "UNTRUSTED ode: a finer solve failed" in capsys.readouterr().out
    trust = json.loads(Path("untrusted.json").read_text())["estimates"][0]["trust"]
    assert trust["trusted"] is False
    assert trust["solver_gap"] is None


def test_a_stopped_evaluation_goes_on_where_it_was(folder, monkeypatch, capsys):
    from nfdm_lightning import evaluation

    args = [*FEW, "--estimators=ode", "--batch_size=1", "--guard=0", "--consistency.samples=0", "--out=resumed.json"]
    assert main([*args[:-1], "--out=whole.json"]) == 0
    add, count = _Shelf.add, 0

    def stop(self, results):
        nonlocal count
        count += 1
        add(self, results)
        self.save()
        if count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation._Shelf, "add", stop)
    assert main(args) == 130
    kept = list(Path(f"{RUN}/checkpoints").glob("last.likelihood_test.partial/*.safetensors"))
    assert len(kept) == 1
    assert load_file(kept[0])["index"].tolist() == [0, 1]
    assert not Path("resumed.json").exists()
    assert main(args) == 0
    assert count == 3  # the third sample alone
    whole, resumed = (json.loads(Path(name).read_text())["estimates"][0] for name in ("whole.json", "resumed.json"))
    assert whole["nats"] == resumed["nats"]


def test_what_is_kept_belongs_to_one_evaluation_alone(folder, monkeypatch, capsys):
    from nfdm_lightning import evaluation

    add = _Shelf.add

    def stop(self, results):
        add(self, results)
        self.save()
        raise KeyboardInterrupt

    args = [*FEW, "--guard=0", "--consistency.samples=0", "--batch_size=2"]
    with monkeypatch.context() as patched:
        patched.setattr(evaluation._Shelf, "add", stop)
        assert main([*args, "--estimators=iw", "--seed=5"]) == 130
    kept = {path: path.read_bytes() for path in Path(f"{RUN}/checkpoints").glob("last.likelihood_test.partial/*")}
    assert len(kept) == 1
    for other in (["--seed=6"], ["--seed=5", "--iw.steps=4"], ["--seed=5", "--split=val"]):
        assert main([*args, "--estimators=iw", "--out=other.json", *other]) == 0  # reads none of it
    assert main([*args, "--estimators=bound", "--seed=5"]) == 0
    assert {path: path.read_bytes() for path in kept} == kept
    assert main([*args, "--estimators=iw", "--seed=5"]) == 0
    assert not list(Path(f"{RUN}/checkpoints").glob("*.partial"))


@pytest.mark.parametrize(
    ("config", "settings", "of", "likelihood"),
    [
        ("digits_nfdm_conditional", ["--model.predictor.network.channels=8"], "SDE", "-log p(x | label)"),
        ("toy2d_bridge", [], "SDE", "-log p(x | source)"),
        ("toy2d_ndm_discrete", [], "SDE in 100 steps", "-log p(x)"),
    ],
)
def test_conditional_models_bridges_and_discrete_time(folder, config, settings, of, likelihood, capsys):
    run = f"runs/{config}"
    fit = ["fit", f"--config={CONFIGS / config}.yaml", f"--trainer.default_root_dir={run}", *FIT[2:7], *settings]
    assert main(fit) == 0
    few = [f"--ckpt_path={run}/checkpoints/last.ckpt", *FEW[2:], "--estimators=bound,iw,ode"]
    assert main(["likelihood", *few]) == 0
    found = report(folder / ".." / folder.name, f"../../{config}/checkpoints/last.likelihood_test.json")
    assert [one["of"] for one in found["estimates"]] == [of, "SDE in 3 steps", "ODE"]
    assert found["likelihood"] == likelihood
    assert len(found["marginals"]["gaps"]) == 2
    if config == "digits_nfdm_conditional":
        assert main(["likelihood", *few, "--data=Digits"]) == 2
        assert "needs data.labels=true" in capsys.readouterr().err


def test_two_processes_give_the_same(folder):
    command = [sys.executable, "-m", "nfdm_lightning", *FEW, "--estimators=bound,ode", "--number=5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    results = []
    for devices in (1, 2):
        name = f"ranks{devices}.json"
        done = subprocess.run(
            [*command, f"--devices={devices}", f"--out={name}"], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(json.loads(Path(name).read_text()))
    assert [result["world_size"] for result in results] == [1, 2]
    for one, two in zip(*(result["estimates"] for result in results), strict=True):
        assert one["nats"] == pytest.approx(two["nats"], rel=1e-6)
        assert one["nats_se"] == pytest.approx(two["nats_se"], rel=1e-4)


def test_settings_of_dequantisation_and_other_data(folder, capsys):
    args = [*FEW, "--estimators=ode", "--guard=0", "--consistency.samples=0", "--number=1", "--out=one.json"]
    assert main([*args, "--ode.dequantisation=TruncatedNormal", "--data=Digits", "--split=val"]) == 0
    one = json.loads(Path("one.json").read_text())
    assert one["estimates"][0]["dequantisation"] == "truncated normal"
    assert one["estimates"][0]["settings"]["dequantisation"] == {"class": "TruncatedNormal", "std": None}
    assert one["split"] == "val"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--estimators=bound,od"], "no estimator 'od'; choose from bound, iw, ode"),
        (["--number=0"], "number=0"),
        (["--data=Toy2D"], "the model is for data of shape (1, 8, 8)"),
        (["--data=Digits", "--data.labels=true"], "the model is not conditional"),
        (["--seed=-1"], "must not be negative"),
        (["--ode.method=rk45"], "choose from dopri5"),
        (["--ode.dequantisation=Density", "--estimators=ode"], "Density is for continuous data"),
        (["--ckpt_path=nowhere.ckpt"], "there is no such file"),
    ],
)
def test_mistakes_are_one_line(folder, args, message, capsys):
    assert main([*FEW, *args]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]


def test_batches_are_halved_until_they_fit():
    tried = []

    def evaluate(places):
        tried.append(len(places))
        if len(places) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return places * 10

    batches = _Batches(9)
    found = torch.cat([result for _, result in batches.over(torch.arange(9), evaluate)])
    assert found.tolist() == [10 * i for i in range(9)]
    assert tried == [9, 4, 2, 2, 2, 2, 1]
    assert batches.batch_size == 2

    def never(places):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(ConfigError, match="single sample"):
        list(_Batches(4).over(torch.arange(2), never))

    def other(places):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(_Batches(4).over(torch.arange(2), other))


def test_a_shelf_forgets_nothing_and_counts_no_sample_twice(tmp_path):
    first, second = _Shelf(tmp_path, "key", 0), _Shelf(tmp_path, "key", 1)
    first.add({"index": torch.tensor([2, 0]), "nats": torch.tensor([2.0, 0.0])})
    first.save()
    second.add({"index": torch.tensor([1, 2]), "nats": torch.tensor([1.0, 2.0])})
    second.save()
    later = _Shelf(tmp_path, "key", 0)  # of a second run, under the name of the first
    later.add({"index": torch.tensor([3]), "nats": torch.tensor([3.0])})
    later.save()
    assert _Shelf(tmp_path, "key", 0).read()["nats"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert _Shelf(tmp_path, "other", 0).read() == {}
    (tmp_path / "key.7.safetensors").write_bytes(b"damaged")
    assert _Shelf(tmp_path, "key", 0).read()["nats"].tolist() == [0.0, 1.0, 2.0, 3.0]

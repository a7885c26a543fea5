"""What the README says is true: its plug-in keeps the contract and trains, its Python runs, its commands parse."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import nfdm_lightning
from conftest import CONFIGS
from nfdm_lightning.cli import main
from nfdm_lightning.evaluation import likelihood_parser
from nfdm_lightning.sampling import sample_parser

FLOAT32 = True

README = (CONFIGS.parent / "README.md").read_text()
PLUGIN, CHECK, PROGRAM = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines() if line.startswith("lightning ")
]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "configs").symlink_to(CONFIGS)
    return tmp_path


def test_plugin_has_fifteen_lines_and_keeps_the_contract():
    assert len([line for line in PLUGIN.splitlines() if line.strip()]) <= 15
    Path("myplugins.py").write_text(PLUGIN)
    sys.modules.pop("myplugins", None)
    sys.path.insert(0, "")
    exec(CHECK, {})  # our own README


def test_plugin_trains_from_the_working_directory():
    Path("myplugins.py").write_text(PLUGIN)
    sys.modules.pop("myplugins", None)
    (command,) = [line for line in COMMANDS if "LearnedNoise" in line]
    few = [
        "--trainer.max_steps=3",
        "--trainer.callbacks=null",
        "--trainer.accelerator=cpu",
        "--data.eval_size=16",
        "--nll.draws=1",
    ]
    assert main([*shlex.split(command)[1:], *few]) == 0
    assert main(["sample", "--ckpt_path=runs/mine/checkpoints/last.ckpt", "--number=2", "--solver.nfe=2"]) == 0


def test_program_runs():
    exec(PROGRAM.replace("max_steps=200", "max_steps=3, logger=False, accelerator='cpu'"), {})
    assert Path("nfdm.ckpt").exists()


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.split()[1] == "fit" and "my" not in line])
def test_commands_parse(command, capsys):
    assert main([*shlex.split(command, comments=True)[1:], "--print_config"]) == 0
    assert "class_path: nfdm_lightning." in capsys.readouterr().out


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.split()[1] in ("sample", "likelihood")])
def test_commands_on_checkpoints_parse(command):
    parser = {"sample": sample_parser, "likelihood": likelihood_parser}[command.split()[1]]()
    parser.parse_args(shlex.split(command, comments=True)[2:])


def test_names_of_the_package_and_a_light_import():
    for name in nfdm_lightning.__all__:
        assert getattr(nfdm_lightning, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = nfdm_lightning.Nothing
    code = "import nfdm_lightning, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Every notebook runs from top to bottom, and the plug-in that one of them writes keeps the contract."""

from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from conftest import CONFIGS
from nfdm_lightning.testing import check_process

NOTEBOOKS = sorted((CONFIGS.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert pictures


def test_the_plugin_of_the_notebook_keeps_the_contract():
    (path,) = [path for path in NOTEBOOKS if path.stem == "write_your_own_process"]
    notebook = nbformat.read(path, as_version=4)
    (source,) = [cell.source for cell in notebook.cells if "plugin" in cell.metadata.get("tags", [])]
    names: dict = {}
    exec(source, names)  # our own notebook
    check_process(names["Turning"]((2,)), torch.randn(8, 2))

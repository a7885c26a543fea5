"""``lightning sample``: samples from a checkpoint, as a picture and as an array file."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from nfdm_lightning import pictures
from nfdm_lightning.cli_errors import Parser
from nfdm_lightning.data import DataModule, to_levels
from nfdm_lightning.errors import CheckpointError, ConfigError
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.processes import Obstacle
from nfdm_lightning.solvers import Solver

_DESCRIPTION = "Draw samples from a checkpoint."


def load_model(path: Path) -> NeuralDiffusion:
    """Rebuilds a model from a checkpoint file, with the averaged weights, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, damaged or not of a NeuralDiffusion.
    """
    if not path.is_file():
        raise CheckpointError(f"--ckpt_path={path}: there is no such file")
    try:
        model = NeuralDiffusion.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, jsonargparse and the parts raise many kinds
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be loaded: {reason[:400]}") from error
    return model.eval()


def sample(
    ckpt_path: str,
    solver: Solver,
    number: int = 64,
    seed: int = 0,
    batch_size: int = 256,
    out: str | None = None,
    trajectories: bool = False,
    device: str = "auto",
    source: DataModule | None = None,
    labels: list[int] | None = None,
    guidance: float = 1.0,
) -> None:
    """Draws samples from a checkpoint, with its averaged weights.

    Writes ``samples.png`` (a grid, or a scatter plot) and ``samples.npy`` to the output folder: uint8 levels for discrete
    data, float32 otherwise, (number, *event); for a conditional model ``labels.npy`` too, (number,).

    Args:
        ckpt_path: checkpoint file.
        solver: EulerMaruyama, Ancestral or TorchSDE (SDE), Heun, Euler or Adaptive (ODE); .nfe sets its evaluations.
        number: how many samples.
        seed: of the random numbers; the same seed gives the same samples.
        batch_size: samples drawn at a time; changes the samples of a seed.
        out: output folder; "samples" beside the folder of the checkpoint by default.
        trajectories: whether to draw trajectories.png too.
        device: cpu, cuda, ... or auto.
        source: for a bridge, the data to start from: Pairs (its sources) or any other data set; the test split. By default
            the data of the run's config.yaml.
        labels: for a conditional model, the classes of the samples, in turn; all by default.
        guidance: weight of classifier-free guidance, for a conditional model; other than 1 it doubles the evaluations.
    """
    if number < 1 or batch_size < 1:
        raise ConfigError(f"number={number} and batch_size={batch_size} must be at least 1")
    model = load_model(Path(ckpt_path))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        model = model.to(name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device={device} cannot be used here ({str(error).splitlines()[0]})") from None
    folder = Path(out) if out is not None else Path(ckpt_path).parent.parent / "samples"
    generator = torch.Generator().manual_seed(seed)
    sources = _sources(model, source, Path(ckpt_path), number)
    if labels is not None and (not labels or model.num_classes is None):
        reason = "give one class at least" if not labels else "the model is not conditional"
        raise ConfigError(f"--labels={labels}: {reason}")
    label = model.labels_in_turn(number, labels)
    parts: list[Tensor] = []
    solution = None
    for begin in range(0, number, batch_size):
        count = min(batch_size, number - begin)
        given, classes = (None if all_ is None else all_[begin : begin + count] for all_ in (sources, label))
        samples, solution = model.sample(
            count, solver, generator, trajectories and begin == 0, given, label=classes, guidance=guidance
        )
        parts.append(samples.cpu())
        if trajectories and begin == 0:
            title = f"{type(model.reverse.process).__name__}: {type(solver).__name__}, {solution.nfe} evaluations"
            start = "prior" if given is None else "source"
            obstacles = [penalty for penalty in model.penalties if isinstance(penalty, Obstacle)]
            pixels = pictures.trajectories(solution.times, solution.trajectory, title, start, obstacles)
            pictures.save_png(pixels, folder / "trajectories.png")
    drawn = torch.cat(parts)
    shown = None if sources is None else sources[:1024]
    pictures.save_png(pictures.sample_grid(drawn[:1024], pictures.columns_of(label), shown), folder / "samples.png")
    levels = model.hparams["levels"]
    array = (drawn.float() if levels is None else to_levels(drawn, levels)).numpy()
    _save(array, folder / "samples.npy")
    if label is not None:
        _save(label.numpy(), folder / "labels.npy")
    assert solution is not None
    twice = "" if guidance == 1 else f" (two per step of the budget, for guidance={guidance:g})"
    print(f"{number} samples by {type(solver).__name__}, {solution.nfe} function evaluations each{twice}: {folder}")


def _save(array: np.ndarray, path: Path) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        np.save(file, array)
    partial.replace(path)


def _sources(model: NeuralDiffusion, data: DataModule | None, ckpt_path: Path, number: int) -> Tensor | None:
    """Returns the samples that a bridge starts from, or None for a model that starts from noise."""
    name = type(model.reverse.process).__name__
    if not model.reverse.process.takes_source:
        if data is not None:
            raise ConfigError(f"--source: {name} is not a bridge, it starts from noise")
        return None
    data = stored_data(ckpt_path, "source") if data is None else data
    return data.sources(number)


def stored_data(ckpt_path: Path, option: str) -> DataModule:
    """Returns the data of the run that wrote a checkpoint.

    Args:
        ckpt_path: the checkpoint.
        option: of the command line, with which other data are given.

    Raises:
        ConfigError: there is no config.yaml in the run's folder.
    """
    config = ckpt_path.parent.parent / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{ckpt_path} has no {config} to say what data it is of: give them with --{option}=")
    parser = Parser()
    parser.add_subclass_arguments(DataModule, "data")
    stored = yaml.safe_load(config.read_text())["data"]
    data = parser.instantiate(parser.parse_object({"data": stored})).data
    assert isinstance(data, DataModule)
    return data


def sample_parser(**kwargs: Any) -> Parser:
    """Returns the parser of the subcommand."""
    parser = Parser(description=_DESCRIPTION, **kwargs)
    parser.add_function_arguments(sample, fail_untyped=True)
    parser.set_defaults({"solver": {"class_path": "nfdm_lightning.solvers.Ancestral"}})
    return parser

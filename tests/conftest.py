"""Shared parts of the tests. Formulas are tested in float64 on networks that are not at their zero start."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from nfdm_lightning.data import Toy2D
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.networks import ResidualMLP, UNet
from nfdm_lightning.predictor import DataSpec, Predictor, XPrediction
from nfdm_lightning.processes import (
    NDM,
    NFDM,
    NFDMOT,
    AffineCoupling,
    Bridge,
    ConditionalFlow,
    Cosine,
    FlowNFDM,
    ForwardProcess,
    Gaussian,
    LearnedMonotone,
    LinearFlow,
    MuLAN,
    SeparableNFDM,
    SplineCoupling,
)
from nfdm_lightning.reverse import ReverseProcess
from nfdm_lightning.volatility import MatchedVolatility, Volatility

torch.set_num_threads(1)  # two threads on two shared cores wait for each other

CONFIGS = Path(__file__).parent.parent / "configs"

small_mlp = partial(ResidualMLP, width=16, depth=1)
small_unet = partial(UNet, channels=8, multipliers=(1, 2))


def small_network(in_shape: tuple[int, ...], out_shape: tuple[int, ...], num_classes: int | None = None) -> nn.Module:
    build = small_unet if len(in_shape) == 3 else small_mlp
    return build(in_shape, out_shape, num_classes=num_classes)


def small_flow(shape: tuple[int, ...], num_classes: int | None = None) -> ConditionalFlow:
    if len(shape) == 3:
        return AffineCoupling(shape, partial(UNet, channels=8, multipliers=(1,)), layers=3, num_classes=num_classes)
    return SplineCoupling(shape, small_mlp, layers=2, num_classes=num_classes)


PROCESSES: dict[str, Callable[[tuple[int, ...]], ForwardProcess]] = {
    "gaussian_vp": Gaussian,
    "gaussian_learned": partial(Gaussian, schedule=LearnedMonotone),
    "gaussian_fm": partial(Gaussian, schedule=LinearFlow),
    "gaussian_cosine": partial(Gaussian, schedule=Cosine),
    "ndm": partial(NDM, network=small_network),
    "ndm_fm": partial(NDM, network=small_network, schedule=LinearFlow),
    "nfdm": partial(NFDM, network=small_network),
    "nfdm_ot": partial(NFDMOT, network=small_network),
    "separable": partial(SeparableNFDM, network=small_network),
    "mulan": partial(MuLAN, network=small_network),
    "flow_nfdm": partial(FlowNFDM, network=small_network, flow=small_flow),
    "flow_affine": partial(FlowNFDM, network=small_network, flow=partial(AffineCoupling, network=small_mlp)),
    "bridge": partial(Bridge, network=small_network),
}
SHAPES = {"vector": (3,), "image": (2, 4, 4)}


def perturb(module: nn.Module, scale: float = 0.15, seed: int = 0) -> None:
    """Moves every parameter off its start, so that nothing is zero by construction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def central_difference(function: Callable[[Tensor], Tensor], t: Tensor, h: float = 1e-5) -> Tensor:
    """Fourth-order central difference."""
    return (8 * (function(t + h) - function(t - h)) - (function(t + 2 * h) - function(t - 2 * h))) / (12 * h)


@pytest.fixture(autouse=True)
def float64_and_seed(request: pytest.FixtureRequest) -> Iterator[None]:
    """float64 in every test but those of whole runs, marked by a module-level FLOAT32; the same draws in any order."""
    torch.manual_seed(0)
    if getattr(request.module, "FLOAT32", False):
        yield
        return
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=PROCESSES)
def process_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return tuple(request.param)


@pytest.fixture
def process(process_name: str, shape: tuple[int, ...]) -> ForwardProcess:
    torch.manual_seed(0)
    built = PROCESSES[process_name](shape)
    perturb(built)
    return built


def batch(
    shape: tuple[int, ...], number: int = 4, seed: int = 1, process: ForwardProcess | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns eps, t in (0.05, 0.95) and x, as the process takes it."""
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(number, *shape, generator=generator)
    x = torch.randn(number, *shape, generator=generator)
    return eps, torch.linspace(0.05, 0.95, number), x if process is None else data_for(process, x)


def data_for(process: ForwardProcess, x: Tensor, seed: int = 2) -> Tensor:
    """Returns x as the process takes it: for a bridge, with a source stacked to each sample."""
    if not process.takes_source:
        return x
    return torch.stack([x, torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)], 1)


class Ignored(nn.Module):
    """A network whose output nobody reads: its input."""

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
        super().__init__()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


class Known(Predictor):
    """A predictor that gives what it was told."""

    def __init__(self, shape: tuple[int, ...], x_hat: Tensor) -> None:
        super().__init__(DataSpec(shape), Ignored)
        self.x_hat = x_hat

    def combine(self, z: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.x_hat.expand_as(z)


def gaussian_data_model(process: ForwardProcess, std: float, volatility: Volatility | None = None) -> ReverseProcess:
    """The exact model of data N(0, std^2 I): with its network at zero, XPrediction is the posterior mean."""
    predictor = XPrediction(DataSpec(process.shape, None, std, process.takes_source), small_network)
    return ReverseProcess(process, predictor, volatility or MatchedVolatility())


def small_model(**settings: object) -> NeuralDiffusion:
    """A model of the plane that trains in milliseconds."""
    network = partial(ResidualMLP, width=16, depth=1)
    defaults = {
        "shape": (2,),
        "data_std": 2.0,
        "process": partial(NFDM, network=network),
        "predictor": partial(XPrediction, network=network),
        "decoder_std": 0.01,
    }
    return NeuralDiffusion(**{**defaults, **settings})  # type: ignore[arg-type]


def small_data(**settings: int) -> Toy2D:
    return Toy2D(**{"train_size": 256, "eval_size": 64, "batch_size": 32, "eval_batch_size": 32, **settings})  # type: ignore[arg-type]


def small_trainer(folder: Path, **settings: object) -> Trainer:
    defaults = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_steps": 5,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, **settings})  # type: ignore[arg-type]

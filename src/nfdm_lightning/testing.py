"""What a forward process has to keep, checked on one: for the authors of plug-ins.

One line in a test says whether a process of one's own is sound, and if not, in words, what is wrong with it:

    check_process(MyProcess((3,)), torch.randn(8, 3))

Every quantity is held against another computation of it: finite differences, or a simulation.
"""

import contextlib
import copy
import io
import itertools
import math
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.processes.base import AffineProcess, ForwardProcess, PathPoint, expand_as_event, sum_event
from nfdm_lightning.reverse import check_time_differentiable

MAX_DIMENSIONS = 256
MAX_SAMPLES = 4

_Outputs = dict[str, Tensor]
_Computations = Iterator[tuple[str, Callable[[], Any]]]
_Source = Callable[[ForwardProcess, Tensor, Tensor, Tensor, Tensor], _Computations]
_STEPS = (1e-5, 1e-7, 1e-6, 1e-4)  # of finite differences: a kink within one of them is not within all


@dataclass(frozen=True)
class Finding:
    """One breach of the contract.

    Attributes:
        check: name of the check that found it.
        message: what is broken, by how much, and the likely cause.
    """

    check: str
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.message}"


class ContractError(AssertionError):
    """A forward process that breaks the contract.

    Attributes:
        findings: the breaches, in the order of the checks.
    """

    def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = list(findings)


def check_process(process: ForwardProcess, x: Tensor, *, seed: int = 0) -> None:
    """Checks a forward process against the contract of :class:`ForwardProcess`.

    It works on a copy in float64 whose parameters are moved off their start, where a zeroed last layer would hide faults;
    the process itself, the random state and the default dtype are left as they are. A process that sees class labels is
    checked without one, or, as ``process.given(torch.tensor([2]))``, under the one that it is given.

    Args:
        process: the process.
        x: a batch of data of the scale that it is made for, (B, *event), or of pairs, (B, 2, *event), for a bridge; at least
            two samples of at most 256 dimensions. Only the first four are used.
        seed: of the random numbers that the checks draw.

    Raises:
        ContractError: lists what is broken, one line each.
        ValueError: x is not data of the process, or too large.
    """
    found, skipped = _examine(process, x, seed)
    if found:
        lines = [f"{type(process).__name__} breaks the contract of a forward process:", *(f"  {one}" for one in found)]
        if skipped:
            lines.append(f"  (not checked, because they build on the above: {', '.join(skipped)})")
        raise ContractError("\n".join(lines), found)


def findings(process: ForwardProcess, x: Tensor, seed: int = 0) -> list[Finding]:
    """Returns what :func:`check_process` would complain about; the arguments are the same."""
    return _examine(process, x, seed)[0]


@dataclass(frozen=True)
class _Case:
    """The moved copy of a process with a batch of everything."""

    process: ForwardProcess
    x: Tensor
    eps: Tensor
    t: Tensor
    seed: int

    @property
    def number(self) -> int:
        return len(self.x)

    @property
    def size(self) -> int:
        return self.eps[0].numel()

    def noise(self, *shape: int, stream: int = 0) -> Tensor:
        """Draws from N(0, I); every stream is another draw, the same in every call."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + stream + 1)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def repeated(self, times: int, stream: int) -> "_Case":
        """Every sample many times, with fresh noise."""
        eps = self.noise(self.number * times, *self.process.shape, stream=stream)
        return replace(self, x=self.x.repeat_interleave(times, 0), eps=eps, t=self.t.repeat_interleave(times))

    def at(self, time: float) -> Tensor:
        return torch.full((self.number,), time, dtype=torch.float64)

    def z(self) -> Tensor:
        return self.process.transform(self.eps, self.t, self.x)


@dataclass(frozen=True)
class _Check:
    """A named check, and the checks without which it says nothing new."""

    name: str
    run: Callable[[_Case], Iterator[str]]
    needs: tuple[str, ...] = ()


def _examine(process: ForwardProcess, x: Tensor, seed: int) -> tuple[list[Finding], list[str]]:
    """Runs the checks; returns their findings and the names of those that were left out."""
    _check_data(process, x)
    found: list[Finding] = []
    skipped: list[str] = []
    with _undisturbed():
        try:
            case = _prepare(process, x, seed)
        except Exception as error:
            found = [Finding("basics", f"copying the process and moving it to float64 {_raised(error)}")]
            return found, [one.name for one in _CHECKS[1:]]
        failed: set[str] = set()
        for check in _CHECKS:
            if failed & set(check.needs):
                skipped.append(check.name)
                failed.add(check.name)
                continue
            new = list(_guarded(check, case))
            found += new
            if new:
                failed.add(check.name)
    return found, skipped


def _guarded(check: _Check, case: _Case) -> Iterator[Finding]:
    """Yields the findings of a check; an exception is one."""
    try:
        for message in check.run(case):
            yield Finding(check.name, message)
    except Exception as error:
        yield Finding(_fault_of(error, check.name), _raised(error))


def _fault_of(error: Exception, otherwise: str) -> str:
    """Returns the check that an exception belongs to, whichever check met it."""
    text = str(error)
    if re.search(r"scalar type|same dtype|dtype.*(Float|float32)|(Float|float32).*dtype", text):
        return "dtype"
    return "device" if re.search(r"same device|expected device", text) else otherwise


def _raised(error: Exception) -> str:
    text = f"raised {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if _fault_of(error, "") == "dtype":
        text += " (something is made in one dtype whatever the input: give it x.dtype, as x.new_zeros does)"
    place = _place(traceback.extract_tb(error.__traceback__))
    return f"{text} [{place}]" if place else text


def _place(frames: Iterable[traceback.FrameSummary]) -> str:
    """Returns file and line of the innermost frame that is neither torch's nor this file's."""
    for frame in reversed(list(frames)):
        if "/torch/" not in frame.filename and frame.filename != __file__ and not frame.filename.startswith("<"):
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return ""


def _check_data(process: ForwardProcess, x: Tensor) -> None:
    event = (2, *process.shape) if process.takes_source else process.shape
    if tuple(x.shape[1:]) != event:
        what = "pairs (B, 2, *event)" if process.takes_source else "data (B, *event)"
        raise ValueError(f"x must be a batch of {what} with shape (B, {', '.join(map(str, event))}), not {tuple(x.shape)}")
    if math.prod(process.shape) > MAX_DIMENSIONS:
        raise ValueError(f"an event of {math.prod(process.shape)} dimensions is above {MAX_DIMENSIONS}: give a smaller x")
    if len(x) < 2:
        raise ValueError("x has one sample; two at least are needed to see whether samples influence one another")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps random state, default dtype and gradient mode, and runs under torch's own defaults."""
    dtype = torch.get_default_dtype()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _prepare(process: ForwardProcess, x: Tensor, seed: int) -> _Case:
    moved = copy.deepcopy(process).to("cpu", torch.float64).train()
    _move(moved, seed)
    x = x[:MAX_SAMPLES].detach().to("cpu", torch.float64, copy=True)
    case = _Case(moved, x, x, x[:, 0], seed)
    spread = torch.linspace(0.08, 0.88, len(x), dtype=torch.float64)
    jitter = torch.rand(len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return replace(case, eps=case.noise(len(x), *process.shape), t=spread + 0.05 * jitter)


def _move(module: nn.Module, seed: int) -> None:
    """Adds small noise to the trained parameters: of the size of an initialisation for weights, small beside the rest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.requires_grad or not parameter.numel():
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            size = parameter.pow(2).mean().sqrt().item()
            scale = 0.1 if size == 0 else min(0.1, 0.3 * size)
            if parameter.ndim >= 2:
                scale = 0.5 / math.sqrt(parameter[0].numel())
            parameter.add_(scale * noise.to(parameter.dtype))


# --- comparing, and saying what is wrong


def _off(got: Tensor, expected: Tensor, floor: float = 1e-8) -> float:
    """Returns the largest relative difference of a sample, whose size counts as no less than ``floor``; infinite for NaN."""
    got, expected = got.detach().flatten(1), expected.detach().flatten(1)
    norms = expected.norm(dim=1)
    scale = norms.maximum(0.1 * norms.pow(2).mean().sqrt()).clamp_min(floor)
    worst = ((got - expected).norm(dim=1) / scale).max().item()
    return worst if math.isfinite(worst) else math.inf


def _rms(value: Tensor) -> float:
    return value.detach().pow(2).mean().sqrt().item()


def _percent(off: float) -> str:
    return f"{100 * off:.3g} %"


def _explain(got: Tensor, expected: Tensor, causes: dict[str, Tensor]) -> str:
    """Returns the first cause that the difference fits, in brackets, or nothing."""
    got, expected = got.detach(), expected.detach()
    if not torch.isfinite(got).all():
        return " (it is not finite)"
    factor = ((got * expected).sum() / (expected**2).sum().clamp_min(1e-300)).item()
    known = {"it has the opposite sign": -expected, "it is 0: detached, or taken in no_grad": torch.zeros_like(expected)}
    for cause, candidate in {**known, **causes}.items():
        if _off(got, candidate) < 1e-3:
            return f" ({cause})"
    return f" (it is {factor:.4g} times what it should be)" if _off(got, factor * expected) < 1e-3 else ""


def _dt(function: Callable[[Tensor], Tensor], t: Tensor, h: float = 1e-5) -> Tensor:
    """Fourth-order central difference."""
    return (8 * (function(t + h) - function(t - h)) - (function(t + 2 * h) - function(t - 2 * h))) / (12 * h)


def _jacobian(function: Callable[[Tensor, Tensor, Tensor], Tensor], at: Tensor, t: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """Central differences of function(at, t, x) in ``at`` with a step per sample, (B, D, *outputs): row i is d / d at_i."""
    number, size = len(at), at[0].numel()
    steps = torch.eye(size, dtype=at.dtype).reshape(1, size, *at.shape[1:]) * expand_as_event(h, at)[:, None]
    rows = [(at[:, None] + sign * steps).flatten(0, 1) for sign in (1, -1)]
    high, low = (function(points, t.repeat_interleave(size), x.repeat_interleave(size, 0)) for points in rows)
    return (high - low).unflatten(0, (number, size)) / (2 * h.reshape(-1, 1, *([1] * (high.ndim - 1))))


def _few(case: _Case) -> int:
    """Number of samples whose whole Jacobian is taken."""
    return case.number if case.size <= 64 else 2


@dataclass(frozen=True)
class _Probe:
    """F at one time, read off its values; exact where F is affine in every dimension by itself."""

    mean: Tensor
    std: Tensor
    affine: bool


def _probe(map_noise: Callable[[Tensor], Tensor], like: Tensor, noise: Tensor) -> _Probe:
    zero = torch.zeros_like(like)
    mean = map_noise(zero)
    std = map_noise(zero + 1) - mean
    return _Probe(mean, std, _off(map_noise(noise), mean + std * noise) < 1e-8)


def _moments(case: _Case, t: Tensor) -> _Probe:
    return _probe(lambda eps: case.process.transform(eps, t, case.x), case.eps, 2 * case.noise(*case.eps.shape, stream=1))


# --- the checks


def _core(process: ForwardProcess, eps: Tensor, z: Tensor, t: Tensor, x: Tensor) -> _Computations:
    """The outputs that every process has to have."""
    yield "transform", lambda: process.transform(eps, t, x)
    yield "inverse", lambda: process.inverse(z, t, x)
    yield "log_prob", lambda: process.log_prob(z, t, x)
    yield "path", lambda: process.path(eps, t, x)


def _derived(process: ForwardProcess, eps: Tensor, z: Tensor, t: Tensor, x: Tensor) -> _Computations:
    """Those that follow from them, and may be overridden."""
    yield "path_at", lambda: process.path_at(z, t, x)
    yield "velocity_at", lambda: process.velocity_at(z, t, x)
    yield "start", lambda: process.start(eps, x)
    yield "prior_log_prob", lambda: process.prior_log_prob(z, process.split(x)[1])
    yield "prior_kl", lambda: process.prior_kl(eps, x)
    yield "reference", lambda: process.reference(t)
    yield "reference_g2", lambda: process.reference_g2(t)


def _all(process: ForwardProcess, eps: Tensor, z: Tensor, t: Tensor, x: Tensor) -> _Computations:
    return itertools.chain(_core(process, eps, z, t, x), _derived(process, eps, z, t, x))


def _named(name: str, value: Any) -> _Outputs:
    if isinstance(value, PathPoint):
        return {f"{name}().{part}": getattr(value, part) for part in ("z", "velocity", "score")}
    if isinstance(value, tuple):
        return {f"{name}().{part}": one for part, one in zip(("alpha", "sigma"), value, strict=True)}
    return {name: value}


def _outputs(source: _Source, process: ForwardProcess, eps: Tensor, t: Tensor, x: Tensor) -> _Outputs:
    result: _Outputs = {}
    z = process.transform(eps, t, x).detach()
    for name, compute in source(process, eps, z, t, x):
        result.update(_named(name, compute()))
    return result


def _shape_of(name: str, case: _Case) -> tuple[int, ...]:
    per_sample = ("log_prob", "prior_log_prob", "prior_kl", "reference().alpha", "reference().sigma", "reference_g2")
    return (case.number,) if name in per_sample else tuple(case.eps.shape)


def _well_formed(source: _Source, case: _Case) -> Iterator[str]:
    arguments = (case.process, case.eps, case.t, case.x)
    first = _outputs(source, *arguments)
    sound = True
    for name, value in first.items():
        wanted = _shape_of(name, case)
        if tuple(value.shape) != wanted:
            sound = False
            yield f"{name} has shape {tuple(value.shape)} instead of {wanted}"
        elif not torch.isfinite(value).all():
            sound = False
            yield f"{name} is not finite at t in (0.05, 0.95)"
    if not sound:
        return
    second = _outputs(source, *arguments)
    differ = {name: _off(second[name][:, None], value[:, None]) for name, value in first.items()}
    changed = [name for name, off in differ.items() if off > 1e-9]
    if changed:
        yield (
            f"{', '.join(changed)} differ between two calls on the same input, by up to {_percent(max(differ.values()))}: "
            "dropout, random numbers or a state that calls change; a forward process must be deterministic"
        )


def _basics(case: _Case) -> Iterator[str]:
    yield from _well_formed(_core, case)


def _layers(case: _Case) -> Iterator[str]:
    try:
        check_time_differentiable(case.process, type(case.process).__name__)
    except ConfigError as error:
        yield str(error)


def _outcomes(case: _Case) -> Iterator[str]:
    yield from _well_formed(_derived, case)


def _sources(case: _Case) -> Iterator[str]:
    process = case.process
    target, source = process.split(case.x)
    if tuple(target.shape) != tuple(case.eps.shape):
        yield f"split(x) gives a target of shape {tuple(target.shape)} instead of {tuple(case.eps.shape)}"
        return
    if process.takes_source is (source is None):
        yield f"takes_source is {process.takes_source}, but split(x) gives {'no' if source is None else 'a'} source"
        return
    joined = process.join(target, source)
    if joined.shape != case.x.shape or not torch.equal(joined, case.x):
        yield "join(*split(x)) is not x"
    end = process.prior(case.eps, source)
    if tuple(end.shape) != tuple(case.eps.shape):
        yield f"prior(eps, source) has shape {tuple(end.shape)} instead of {tuple(case.eps.shape)}"
    shift = torch.as_tensor(process.offset(case.t, source))
    if torch.broadcast_shapes(shift.shape, case.eps.shape) != case.eps.shape:
        yield f"offset(t, source) of shape {tuple(shift.shape)} does not broadcast to {tuple(case.eps.shape)}"


def _batch(case: _Case) -> Iterator[str]:
    process, together = case.process, _outputs(_all, case.process, case.eps, case.t, case.x)
    offs = dict.fromkeys(together, 0.0)
    for i in (0, case.number - 1):
        one = slice(i, i + 1)
        try:
            alone = _outputs(_all, process, case.eps[one], case.t[one], case.x[one])
        except Exception as error:
            yield f"a batch of one sample {_raised(error)}"
            return
        for name, value in together.items():
            offs[name] = max(offs[name], _off(alone[name][:, None], value[one, None]))
    wrong = [name for name, off in offs.items() if off > 1e-7]
    if wrong:
        yield (
            f"{', '.join(wrong)} of a sample depend on the others in its batch, by up to {_percent(max(offs.values()))}: "
            "statistics over the batch, or a sum or mean over the wrong dimension"
        )
    time = torch.tensor(0.3, dtype=torch.float64)
    plain = _outputs(_all, process, case.eps, case.at(0.3), case.x)
    try:
        expanded = _outputs(_all, process, case.eps, time.expand(case.number), case.x)
    except Exception as error:
        yield f"a time expanded to the batch (not contiguous) {_raised(error)}"
        return
    wrong = [name for name, value in plain.items() if _off(expanded[name][:, None], value[:, None]) > 1e-7]
    if wrong:
        yield f"{', '.join(wrong)} change when t is an expanded tensor instead of a contiguous one with the same values"


def _dtype(case: _Case) -> Iterator[str]:
    exact = _outputs(_all, case.process, case.eps, case.t, case.x)
    wide = [name for name, value in exact.items() if value.dtype != torch.float64]
    if wide:
        yield f"{', '.join(wide)} come in {exact[wide[0]].dtype} for inputs in float64: use x.dtype, never a dtype by name"
        return
    single = copy.deepcopy(case.process).float()
    eps, t, x = case.eps.float(), case.t.float(), case.x.float()
    try:
        rough = _outputs(_all, single, eps, t, x)
    except Exception as error:
        yield f"in float32 the process {_raised(error)}"
        return
    wrong = [name for name, value in rough.items() if value.dtype != torch.float32]
    if wrong:
        yield f"{', '.join(wrong)} come in {rough[wrong[0]].dtype} for inputs in float32: use x.dtype, never a dtype by name"
        return
    offs = {name: _off(value[:, None].double(), exact[name][:, None], 0.1) for name, value in rough.items()}
    wrong = [name for name, off in offs.items() if off > 0.02]
    if wrong:
        yield (
            f"{', '.join(wrong)} lose too much in float32: {_percent(max(offs.values()))} away from float64; look for "
            "differences of nearly equal numbers, and logarithms of exponentials"
        )
    with torch.inference_mode():
        quiet = _outputs(_core, case.process, case.eps.clone(), case.t.clone(), case.x.clone())
    for name, value in quiet.items():
        off = _off(value.clone()[:, None], exact[name][:, None])
        if off > 1e-7:
            zero = " (it is 0: take time derivatives by time_derivative)" if not value.any() else ""
            yield f"{name} differs by {_percent(off)} in inference mode{zero}"


def _precision(case: _Case) -> Iterator[str]:
    """Along steps of 1e-8 a computation in float32, whose numbers are 1e-7 apart, moves by jumps."""
    process, steps = case.process, 64
    eps, t, x = case.eps, case.t, case.x
    inputs = {
        "eps": (case.noise(*eps.shape, stream=3), torch.zeros_like(t), torch.zeros_like(x)),
        "t": (torch.zeros_like(eps), torch.ones_like(t), torch.zeros_like(x)),
        "x": (torch.zeros_like(eps), torch.zeros_like(t), max(1.0, _rms(x)) * case.noise(*x.shape, stream=2)),
    }
    for name, directions in inputs.items():
        rows = []
        for value, direction in zip((eps, t, x), directions, strict=True):
            along = 1e-8 * torch.arange(steps, dtype=torch.float64).reshape(-1, *([1] * value.ndim))
            rows.append((value + along * direction).flatten(0, 1))
        with torch.no_grad():
            path = process.transform(*rows).unflatten(0, (steps, -1)).flatten(1)
        moves = path.diff(dim=0)
        size = moves.norm(dim=1).mean().item()
        jumps = (moves.diff(dim=0).norm(dim=1) > 0.02 * size).double().mean().item()
        if size > 1e-12 * (1 + _rms(path)) and jumps > 0.05:
            yield (
                f"transform moves by jumps along small steps in {name}: it computes in float32 for inputs in float64 "
                "(.float(), a float32 constant), and finite differences cannot check it; use the dtype of the input"
            )
            return


class _OneDevice(TorchDispatchMode):
    """Refuses operations that mix the meta device with tensors on the CPU; some kernels of meta do not notice."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not name.startswith(("aten.index", "aten.copy_", "aten._to_copy", "aten._index_put", "aten._unsafe_index")):
            tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
            if len({tensor.device.type for tensor in tensors if tensor.ndim}) > 1:
                raise _MixedDevicesError(f"{name} [{_place(traceback.extract_stack())}]")
        return func(*args, **(kwargs or {}))


class _MixedDevicesError(RuntimeError):
    pass


def _device(case: _Case) -> Iterator[str]:
    process = copy.deepcopy(case.process).to("meta")
    eps, t, x = (value.to("meta") for value in (case.eps, case.t, case.x))
    advice = "create it on the device of the input, as x.new_zeros does, or register it as a buffer"
    mixing: dict[str, list[str]] = {}
    with _OneDevice():
        for name, compute in _all(process, eps, eps, t, x):
            try:
                value = compute()
            except _MixedDevicesError as error:
                mixing.setdefault(str(error), []).append(name)
            except Exception as error:  # most are control flow on values, which meta tensors do not have: no fault
                if _fault_of(error, "") == "device":
                    mixing.setdefault(_raised(error), []).append(name)
            else:
                stray = [key for key, one in _named(name, value).items() if one.device.type != "meta"]
                if stray:
                    mixing.setdefault("the result stays there", []).extend(stray)
    if mixing:
        names = dict.fromkeys(itertools.chain(*mixing.values()))
        yield f"{', '.join(names)} use a tensor that is on the CPU wherever the process is: {advice} ({next(iter(mixing))})"
        return
    if torch.cuda.is_available():
        there = copy.deepcopy(case.process).to("cuda")
        exact = _outputs(_all, case.process, case.eps, case.t, case.x)
        for name, value in _outputs(_all, there, case.eps.cuda(), case.t.cuda(), case.x.cuda()).items():
            if value.device.type != "cuda":
                yield f"{name} comes on {value.device} from a process on cuda: {advice}"
            elif (off := _off(value.cpu()[:, None], exact[name][:, None])) > 1e-5:
                yield f"{name} on cuda differs by {_percent(off)} from that on the CPU"


def _plain_tensors(value: Any) -> bool:
    """Whether a value holds floating-point tensors that torch does not know of."""
    if isinstance(value, Tensor):
        return value.is_floating_point()
    if isinstance(value, nn.Module):
        return any(True for _ in itertools.chain(value.parameters(), value.buffers()))
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple | set):
        return False
    return any(_plain_tensors(one) for one in value)


def _attributes(case: _Case) -> Iterator[str]:
    for path, module in case.process.named_modules():
        registered = ("_parameters", "_buffers", "_modules")
        for name, value in vars(module).items():
            if name not in registered and _plain_tensors(value):
                full = f"{path}.{name}" if path else name
                yield (
                    f"{full} holds tensors as a plain attribute: they are not saved, trained or moved to a device; "
                    "use nn.Parameter, register_buffer or nn.ModuleList"
                )


def _state(case: _Case) -> Iterator[str]:
    file = io.BytesIO()
    torch.save(case.process.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(case.process)
    _move(other, case.seed + 1)
    try:
        other.load_state_dict(torch.load(file, weights_only=True))
    except Exception as error:
        yield f"saving and loading the state_dict with weights_only=True {_raised(error)}"
        return
    saved, loaded = (_outputs(_all, one, case.eps, case.t, case.x) for one in (case.process, other))
    wrong = [name for name, value in saved.items() if _off(loaded[name][:, None], value[:, None]) > 1e-9]
    if wrong:
        yield f"{', '.join(wrong)} change when the state_dict is saved and loaded into a copy with other weights"


def _round_trip(case: _Case) -> Iterator[str]:
    process = case.process
    back = process.inverse(case.z(), case.t, case.x)
    off = _off(back, case.eps)
    if off > 1e-5:
        at = _moments(case, case.t)
        causes = {
            "it is divided by the std once too often": case.eps / at.std,
            "it is not divided by the std": case.eps * at.std,
            "it does not subtract the mean": case.eps + at.mean / at.std,
            "it adds the mean instead of subtracting it": case.eps + 2 * at.mean / at.std,
        }
        yield f"inverse(transform(eps)) differs from eps by {_percent(off)}{_explain(back, case.eps, causes)}"
        return
    state = case.z() + 0.1 * case.noise(*case.eps.shape, stream=4)
    there = process.transform(process.inverse(state, case.t, case.x), case.t, case.x)
    off = _off(there, state)
    if off > 1e-5:
        yield f"transform(inverse(z)) differs from z by {_percent(off)} for a z near the path: inverse fails there"


def _log_prob(case: _Case) -> Iterator[str]:
    few = slice(_few(case))
    eps, t, x = case.eps[few], case.t[few], case.x[few]
    got = case.process.log_prob(case.process.transform(eps, t, x), t, x)
    matrix = _jacobian(case.process.transform, eps, t, x, torch.full_like(t, 1e-5)).flatten(2)
    volume = torch.linalg.slogdet(matrix).logabsdet
    constant = 0.5 * case.size * math.log(2 * math.pi)
    square = sum_event(-0.5 * eps**2)
    expected = square - constant - volume
    worst = (got - expected).abs().max().item()
    if worst < 1e-3 + 1e-5 * expected.abs().max().item():
        return
    causes = {
        "it lacks the log std, or the log determinant of the inverse": square - constant,
        "its log std or log determinant has the wrong sign": square - constant + volume,
        "it lacks -D/2 log(2 pi)": square - volume,
        "it lacks -D/2 log(2 pi) and the log std": square,
        f"it is a mean over the {case.size} dimensions instead of a sum": expected / case.size,
        "it is in bits instead of nats": expected / math.log(2),
        "its square lacks the factor 1/2": 2 * square - constant - volume,
        "its constant has the wrong sign": square + constant - volume,
        "it is minus the log density": -expected,
    }
    close = [cause for cause, value in causes.items() if (got - value).abs().max().item() < 1e-3]
    why = f" ({close[0]})" if close else ""
    if not close and (got - expected).std() < 1e-3:
        why = f" (by the constant {(got - expected).mean().item():.4g})"
    yield f"differs from log N(eps) - log |det dF/deps| by up to {worst:.4g} nats{why}"


def _velocity(case: _Case) -> Iterator[str]:
    process, (eps, t, x) = case.process, (case.eps, case.t, case.x)
    point = process.path(eps, t, x)
    off = _off(point.z, case.z())
    if off > 1e-7:
        yield f"path().z differs from transform(eps, t, x) by {_percent(off)}"
    tries = [_dt(lambda time: process.transform(eps, time, x), t, h) for h in _STEPS]
    expected = min(tries, key=lambda one: _off(point.velocity, one))
    off = _off(point.velocity, expected)
    if off < 1e-4:
        return
    mean_dt = _dt(lambda time: process.transform(torch.zeros_like(eps), time, x), t)
    noise_dt = expected - mean_dt
    causes = {
        "it lacks the derivative of the noise, std' eps": mean_dt,
        "it lacks the derivative of the mean": noise_dt,
        "the derivative of the mean has the wrong sign": noise_dt - mean_dt,
        "the derivative of the std has the wrong sign": mean_dt - noise_dt,
    }
    yield (
        f"path().velocity differs from the finite difference of transform in t at fixed eps by {_percent(off)}"
        f"{_explain(point.velocity, expected, causes)}"
    )


def _score(case: _Case) -> Iterator[str]:
    few = slice(_few(case))
    eps, t, x = case.eps[few], case.t[few], case.x[few]
    got = case.process.path(eps, t, x).score
    z = case.process.transform(eps, t, x)
    scale = (z - case.process.transform(eps + 1e-3, t, x)).abs().flatten(1).amin(1).clamp_min(1e-12) * 1e3
    tries = [_jacobian(case.process.log_prob, z, t, x, h * scale).reshape(z.shape) for h in (1e-4, 1e-5, 1e-3)]
    expected = min(tries, key=lambda one: _off(got, one))
    off = _off(got, expected)
    if off < 1e-4:
        return
    std = _moments(replace(case, eps=eps, x=x), t).std
    causes = {
        f"{sign}{text}": factor * value
        for sign, factor in (("", 1), ("with the opposite sign, and ", -1))
        for text, value in {
            "it lacks the factor 1/std, as eps does": expected * std,
            "it lacks the factor 1/std^2": expected * std**2,
            "it is divided by the std once too often": expected / std,
            f"it is a mean over the {case.size} dimensions instead of a sum": expected / case.size,
        }.items()
    }
    yield f"path().score differs from the gradient of log_prob in z by {_percent(off)}{_explain(got, expected, causes)}"


def _path_at(case: _Case) -> Iterator[str]:
    process = case.process
    given = process.path(case.eps, case.t, case.x)
    again = process.path_at(case.z(), case.t, case.x)
    for name in ("z", "velocity", "score"):
        got, expected = getattr(again, name), getattr(given, name)
        off = _off(got, expected)
        if off > 1e-6:
            zero = process.path(torch.zeros_like(case.eps), case.t, case.x)
            causes = {"it is that of eps = 0: z is not used": getattr(zero, name)}
            yield (
                f"path_at(z).{name} differs from path(eps).{name} at the same point by {_percent(off)}"
                f"{_explain(got, expected, causes)}"
            )
            return
    alone, expected = process.velocity_at(case.z(), case.t, case.x), again.velocity
    off = _off(alone, expected)
    if off > 1e-6:
        yield (
            f"velocity_at(z) differs from path_at(z).velocity by {_percent(off)}{_explain(alone, expected, {})}: "
            "override both or neither"
        )


def _reference(case: _Case) -> Iterator[str]:
    process, t = case.process, torch.linspace(0, 1, 21, dtype=torch.float64)
    alpha, sigma = process.reference(t)
    g2 = process.reference_g2(t)
    for name, value in (("alpha", alpha), ("sigma", sigma), ("reference_g2", g2)):
        if value.shape != t.shape:
            yield f"{name} has shape {tuple(value.shape)} for a t of shape {tuple(t.shape)}; it must be the same"
            return
        bad = ~torch.isfinite(value) if name == "alpha" else ~(torch.isfinite(value) & (value > 0))
        if bad.any():
            where = f"{value[bad][0].item():.4g} at t = {t[bad][0].item():.3g}"
            wanted = "finite" if name == "alpha" else "finite and above 0"
            yield f"{name} is {where}; it must be {wanted} for all t in [0, 1]"
            return
    inner = torch.linspace(0.1, 0.85, 7, dtype=torch.float64)
    slope = _dt(process.reference_log_ratio, inner)
    expected = 2 * process.reference(inner)[1] ** 2 * slope
    off = _off(process.reference_g2(inner)[:, None], expected[:, None])
    if off > 1e-2:
        why = _explain(process.reference_g2(inner)[:, None], expected[:, None], {})
        yield (
            "reference_g2 differs from 2 sigma^2 d/dt log(sigma / alpha), the slope of reference_log_ratio, by "
            f"{_percent(off)}{why}: override both or neither"
        )


def _ends(case: _Case) -> Iterator[str]:
    process, x = case.process, case.x
    target, source = process.split(x)
    for time in (0.0, 1.0):
        point = process.path(case.eps, case.at(time), x)
        bad = [name for name in ("z", "velocity", "score") if not torch.isfinite(getattr(point, name)).all()]
        if bad:
            yield (
                f"path().{' and '.join(bad)} are not finite at t = {time:g}: the std underflows to 0 or a term diverges; "
                "pin it in log space, as NFDM does"
            )
            return
    first, last = (process.transform(case.eps, case.at(time), x) for time in (0.0, 1.0))
    begin = process.prior(case.eps, source)
    if _rms(first - begin) < _rms(first - target) and _rms(last - target) < _rms(last - begin):
        yield "time runs backwards: z_0 is noise and z_1 is data; t = 0 must be the data and t = 1 the prior"
        return
    start = process.start(case.eps, x)
    off = _off(start, first)
    size = _rms(first - process.transform(-case.eps, case.at(0.0), x)) / 2
    at = _moments(case, case.at(0.0))
    if off > 1e-5 or _rms(start - first) > 1e-4 * size:
        why = " (it has no noise)" if _off(start, at.mean) < 1e-9 else ""
        share = _percent(_rms(start - first) / size)
        yield f"start(eps, x) differs from transform(eps, 0, x) by {share} of the noise there{why}"
        return
    alpha, sigma = (expand_as_event(value, target) for value in process.reference(case.at(0.0)))
    shift = _rms((at.mean - alpha * target - process.offset(case.at(0.0), source)) / sigma)
    ratio = _rms(at.std / sigma)
    if shift > 3 or not 1 / 3 < ratio < 3:
        yield (
            f"z_0 is not where reference(0) has it, N(alpha x, sigma^2): its mean is {shift:.3g} sigma away and its std "
            f"{ratio:.3g} sigma; pin the process at t = 0, or override reference() or delta to say what it is"
        )


def _gaussian_kl(at: _Probe, prior: _Probe) -> Tensor:
    ratio = at.std / prior.std
    return sum_event(
        (0.5 * (((at.mean - prior.mean) / prior.std) ** 2 + ratio**2 - 1) - ratio.abs().log()).expand_as(at.mean)
    )


def _prior_kl(case: _Case) -> Iterator[str]:
    many = replace(case, x=case.x[:2], eps=case.eps[:2], t=case.t[:2]).repeated(max(2048 // case.size, 64), stream=5)
    process, source, ones = case.process, case.process.split(case.x)[1], case.at(1.0)
    prior = _probe(lambda eps: process.prior(eps, source), case.eps, case.noise(*case.eps.shape, stream=6))
    if not prior.affine:
        return
    at = _moments(case, ones)
    with torch.no_grad():
        begin = process.prior(case.eps, source)
        stated = process.prior_log_prob(begin, source)
        true = sum_event(
            (-0.5 * ((begin - prior.mean) / prior.std) ** 2 - prior.std.log() - 0.5 * math.log(2 * math.pi)).expand_as(begin)
        )
        if ((stated - true).abs() > 1e-6 + 1e-4 * true.abs()).any():
            i = int((stated - true).abs().argmax())
            yield f"prior_log_prob is {stated[i].item():.4g} nats where the density of prior is {true[i].item():.4g}"
        got = process.prior_kl(many.eps, many.x).unflatten(0, (2, -1))
        if at.affine:
            expected = _gaussian_kl(at, prior)[:2]
            spread = got.std(1) / math.sqrt(got.shape[1])
        else:
            end = torch.ones_like(many.t)
            z = process.transform(many.eps, end, many.x)
            times = len(many.t) // 2
            mean, std = (value[:2].repeat_interleave(times, 0) for value in (prior.mean, prior.std.expand_as(prior.mean)))
            density = sum_event(-0.5 * ((z - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi))
            values = (process.log_prob(z, end, many.x) - density).unflatten(0, (2, -1))
            expected, spread = values.mean(1), (values - got).std(1) / math.sqrt(times)
    mean = got.mean(1)
    ends = f"at t = 1 its mean is {_rms(at.mean - prior.mean):.3g} away from the prior's and its std is " + (
        f"{_rms(at.std):.3g} instead of {_rms(prior.std):.3g}"
    )
    off = (mean - expected).abs()
    if (off > 5 * spread + 1e-6 + 1e-4 * expected.abs()).any():
        i = int((off - 5 * spread).argmax())
        why = f" ({ends}: it is not pinned to the prior, yet prior_kl says that it is)" if not mean.any() else ""
        if not why and (off > 10 * spread).all():
            divided = {f"it is a mean over the {case.size} dimensions instead of a sum": expected[:, None] / case.size}
            why = _explain(mean[:, None], expected[:, None], divided) or f" ({ends})"
        yield f"prior_kl is {mean[i].item():.4g} nats where KL(q(z_1 | x) || prior) is {expected[i].item():.4g}{why}"
    elif (expected > 0.5 * case.size).any():
        yield (
            f"KL(q(z_1 | x) || prior) is {expected.max().item() / case.size:.3g} nats per dimension: the process does not "
            f"end in its prior; {ends}"
        )


def _ode(case: _Case) -> Iterator[str]:
    process, x = case.process, case.x
    begin, length = case.t - 0.015, 0.03  # short, because few steps have to resolve the fastest network

    def solve(steps: int) -> float:
        z, h = process.transform(case.eps, begin, x), length / steps

        def slope(state: Tensor, t: Tensor) -> Tensor:
            return process.velocity_at(state, t, x)

        for k in range(steps):
            t = begin + k * h
            a = slope(z, t)
            b = slope(z + 0.5 * h * a, t + 0.5 * h)
            c = slope(z + 0.5 * h * b, t + 0.5 * h)
            d = slope(z + h * c, t + h)
            z = z + h / 6 * (a + 2 * b + 2 * c + d)
        end = process.transform(case.eps, begin + length, x)
        return _off(z - process.transform(case.eps, begin, x), end - process.transform(case.eps, begin, x))

    with torch.no_grad():
        off = coarse = solve(3)
        if off > 1e-2:
            off = solve(30)
    # an error of the integration itself shrinks with the step
    if off > 1e-2 and off > 0.3 * coarse:
        yield f"the ODE dz = velocity dt from t to t + {length} misses transform there by {_percent(off)} of its way"


def _sde(case: _Case) -> Iterator[str]:
    begin, end = 0.6, 0.45
    many = case.repeated(max(768 // (case.number * case.size), 8), stream=7)
    process, x = case.process, many.x
    with torch.no_grad():
        # any g keeps the marginals; a smaller one where the noise is small keeps the integration stable
        grid = [case.at(time) for time in torch.linspace(end, begin, 5).tolist()]
        rates = [process.reference_g2(t) / (2 * _moments(case, t).std.flatten(1).abs().amin(1) ** 2) for t in grid]
        share = min(1.0, 15 / max(rate.max().item() for rate in rates))

        def solve(steps: int) -> Tensor:
            z, h = process.transform(many.eps, many.t * 0 + begin, x), (begin - end) / steps

            def back(state: Tensor, time: float) -> tuple[Tensor, Tensor]:
                t = many.t * 0 + time
                point, g2 = process.path_at(state, t, x), expand_as_event(share * process.reference_g2(t), state)
                return 0.5 * g2 * point.score - point.velocity, g2

            for k in range(steps):  # Heun's method: of second order, because the noise is additive
                time = begin - k * h
                drift, g2 = back(z, time)
                kick = (g2 * h).sqrt() * many.noise(*z.shape, stream=100 + k)
                z = z + 0.5 * h * (drift + back(z + h * drift + kick, time - h)[0]) + kick
            return process.inverse(z, many.t * 0 + end, x)

        ends = [solve(10)]
        problem = _not_normal(ends[0], 0.03)
        if problem:  # an error of the integration itself shrinks with the step
            ends.append(solve(60))
            coarse, fine = (max(abs(eps.mean().item()), abs(eps.pow(2).mean().item() - 1)) for eps in ends)
            problem = _not_normal(ends[1], 0.03) if not fine < 0.5 * coarse else ""
    if problem:
        yield (
            f"the reverse SDE dz = (velocity - g^2 score / 2) dt + g dw of one x from t = {begin} to {end} does not keep "
            f"q(z_t | x): the inverse of its end {problem}"
        )


def _not_normal(eps: Tensor, bias: float) -> str:
    """Says how noise differs from N(0, 1), allowing for a bias and six standard errors."""
    number, mean, square = eps.numel(), eps.mean().item(), eps.pow(2).mean().item()
    if abs(mean) < 6 / math.sqrt(number) + bias and abs(square - 1) < 6 * math.sqrt(2 / number) + 3 * bias:
        return ""
    return f"has mean {mean:.3g} and mean square {square:.3g} instead of 0 and 1"


def _transition(case: _Case) -> Iterator[str]:
    process, (eps, t, x), nothing = case.process, (case.eps, case.t, case.x), torch.zeros_like(case.t)
    gap = 0.03
    s, zero = t - gap, torch.zeros_like(eps)
    expected = process.transform(eps, s, x)
    off = _off(process.transition(case.z(), t, s, x, nothing, nothing, case.noise(*eps.shape, stream=8)), expected)
    if off > 1e-5:
        yield f"with g = 0 it must be the ODE step transform(inverse(z, t, x), s, x), but differs from it by {_percent(off)}"
        return
    at = [_moments(case, time) for time in (t, 0.5 * (s + t), s)]
    # where the noise is far below the reference's, its g would forget everything in one step
    fastest = max((process.reference_g2(t) / one.std.flatten(1).abs().amin(1) ** 2).max().item() for one in at)

    def g2_at(time: Tensor) -> Tensor:
        return min(1.0, 1 / (gap * fastest)) * process.reference_g2(time)

    def step(state: Tensor, noise: Tensor) -> Tensor:
        """The step in eps: from that at t to that at s."""
        z = process.transition(process.transform(state, t, x), t, s, x, g2_at(t), g2_at(s), noise)
        return process.inverse(z, s, x)

    with torch.no_grad():
        base = step(zero, zero)
        carried, fresh = step(zero + 1, zero) - base, step(zero, zero + 1) - base
        mixed = case.noise(*eps.shape, stream=9)
        linear = _off(step(eps, mixed), base + carried * eps + fresh * mixed) < 1e-6
    total = carried**2 + fresh**2
    exact = linear and base.abs().max().item() < 1e-6 and _off(total, torch.ones_like(total)) < 1e-5
    if not exact and not isinstance(process, AffineProcess):
        yield from _first_order(case, fastest)  # no more is promised
    elif base.abs().max().item() > 1e-6:
        yield f"it does not keep the mean of q(z_s | x): it is off by {base.abs().max().item():.3g} std"
    elif not exact:
        why = ""
        if _off(fresh.abs(), torch.ones_like(fresh)) < 1e-5:
            why = " (the fresh noise lacks the factor sqrt(1 - rho^2))"
        elif not fresh.any():
            why = " (it adds no fresh noise)"
        yield f"it does not keep the variance of q(z_s | x): it becomes {total.mean().item():.4g} times as large{why}"
    elif isinstance(process, AffineProcess):
        rates = [
            expand_as_event(g2_at(time), eps) / (2 * one.std**2) for time, one in zip((t, 0.5 * (s + t), s), at, strict=True)
        ]
        wanted = (gap * (rates[0] + 4 * rates[1] + rates[2]) / 6).expand_as(carried)
        off = _off(-carried.abs().log(), wanted)
        if off > 0.25:  # the rate is a trapezoidal rule
            why = _explain(-carried.abs().log(), wanted, {})
            yield f"it forgets the noise at a rate that differs from g^2 / (2 std^2) by {_percent(off)}{why}"


def _first_order(case: _Case, fastest: float) -> Iterator[str]:
    """Many small transitions of many samples: their end must be distributed as q(z_s | x)."""
    process, steps, gap = case.process, 10, 0.005
    many = case.repeated(max(3072 // (case.number * case.size), 16), stream=10)
    share = min(1.0, 0.15 / (gap * fastest))
    with torch.no_grad():
        z = process.transform(many.eps, many.t, many.x)
        for k in range(steps):
            t, s = many.t - k * gap, many.t - (k + 1) * gap
            g2_t, g2_s = (share * process.reference_g2(time) for time in (t, s))
            z = process.transition(z, t, s, many.x, g2_t, g2_s, many.noise(*z.shape, stream=100 + k))
        problem = _not_normal(process.inverse(z, many.t - steps * gap, many.x), 0.03)
    if problem:
        yield f"{steps} small steps do not keep q(z_s | x): the inverse of their end {problem}"


def _differentiable(process: ForwardProcess, eps: Tensor, z: Tensor, t: Tensor, x: Tensor) -> _Outputs:
    """The quantities whose gradients count."""
    path, at = process.path(eps, t, x), process.path_at(z, t, x)
    alpha, sigma = process.reference(t)
    return {
        "transform": process.transform(eps, t, x),
        "inverse": process.inverse(z, t, x),
        "log_prob": process.log_prob(z, t, x),
        "path().velocity": path.velocity,
        "path().score": path.score,
        "path_at().velocity": at.velocity,
        "path_at().score": at.score,
        "velocity_at": process.velocity_at(z, t, x),
        "start": process.start(eps, x),
        "prior_kl": process.prior_kl(eps, x),
        "reference().alpha": alpha,
        "reference().sigma": sigma,
        "reference_g2": process.reference_g2(t),
    }


@dataclass(frozen=True)
class _Inputs:
    """Where gradients are taken: the trained parameters, and (eps, z, x)."""

    process: ForwardProcess
    parameters: dict[str, nn.Parameter]
    values: tuple[Tensor, Tensor, Tensor]

    @staticmethod
    def of(case: _Case) -> "_Inputs":
        process = copy.deepcopy(case.process)
        parameters = {name: one for name, one in process.named_parameters() if one.requires_grad}
        z = case.z().detach()
        return _Inputs(process, parameters, (case.eps.clone(), z, case.x.clone()))

    def moved(self, parameters: dict[str, Tensor], values: Sequence[Tensor | None], h: float) -> "_Inputs":
        process = copy.deepcopy(self.process)
        own = dict(process.named_parameters())
        with torch.no_grad():
            for name, direction in parameters.items():
                own[name].add_(h * direction)
        eps, z, x = (
            value if direction is None else value + h * direction
            for value, direction in zip(self.values, values, strict=True)
        )
        return _Inputs(process, {name: own[name] for name in self.parameters}, (eps, z, x))

    def difference(
        self,
        function: Callable[["_Inputs"], _Outputs],
        parameters: dict[str, Tensor],
        values: Sequence[Tensor | None],
        h: float,
    ) -> _Outputs:
        high, low = (function(self.moved(parameters, values, sign * h)) for sign in (1, -1))
        return {name: ((high[name] - low[name]) / (2 * h)).detach() for name in high}


def _gradients(case: _Case) -> Iterator[str]:
    inputs = _Inputs.of(case)

    def compute(at: _Inputs) -> _Outputs:
        eps, z, x = at.values
        return _differentiable(at.process, eps, z, case.t, x)

    leaves = [*inputs.parameters.values(), *(value.requires_grad_() for value in inputs.values)]
    outputs = compute(inputs)
    weights = {name: case.noise(*value.shape, stream=20 + i) for i, (name, value) in enumerate(outputs.items())}
    gradients = {}
    for name, value in outputs.items():
        known = value.requires_grad
        total = (weights[name] * value).sum()
        got = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True) if known else [None] * len(leaves)
        gradients[name] = [
            torch.zeros_like(leaf) if one is None else one.detach() for one, leaf in zip(got, leaves, strict=True)
        ]
    along = {
        name: case.noise(*one.shape, stream=40 + i) / math.sqrt(max(one.numel(), 1))
        for i, (name, one) in enumerate(inputs.parameters.items())
    }
    eps, z, x = (case.noise(*value.shape, stream=60 + i) for i, value in enumerate(inputs.values))
    directions: dict[str, tuple[dict[str, Tensor], tuple[Tensor | None, ...]]] = {
        "the parameters": (along, (None, None, None)),
        "x": ({}, (None, None, x)),
        "the state": ({}, (eps, z, None)),
    }
    wrong: dict[str, dict[str, str]] = {}
    for where, (parameters, values) in directions.items():
        if where == "the parameters" and not inputs.parameters:
            continue
        tangent = [parameters.get(name, torch.zeros(())) for name in inputs.parameters]
        tangent += [torch.zeros(()) if value is None else value for value in values]
        slopes = {
            name: sum((one * way).sum().item() for one, way in zip(gradients[name], tangent, strict=True))
            for name in outputs
        }
        offs = dict.fromkeys(outputs, math.inf)
        for h in _STEPS:
            for name, change in inputs.difference(compute, parameters, values, h).items():
                offs[name] = min(offs[name], _slope_off(slopes[name], change, weights[name], outputs[name]))
            if max(offs.values()) < 1e-3:
                break
        for name, off in offs.items():
            if not off < 1e-3:
                wrong.setdefault(name, {})[where] = "missing" if slopes[name] == 0 else f"wrong by {_percent(off)}"
    if wrong:
        told = "; ".join(
            f"{name} (" + ", ".join(f"in {where} {how}" for where, how in places.items()) + ")"
            for name, places in wrong.items()
        )
        yield f"gradients do not equal finite differences: {told}; look for detach(), no_grad, .data and .item()"
    idle = [name for i, name in enumerate(inputs.parameters) if all(not one[i].any() for one in gradients.values())]
    unused: list[str] = []
    silent: list[str] = []
    for name in idle:
        changed = inputs.difference(compute, {name: torch.ones_like(inputs.parameters[name])}, (None,) * 3, 1e-2)
        moves = any(_rms(value) > 1e-9 * (1 + _rms(outputs[key])) for key, value in changed.items())
        (silent if moves else unused).append(name)
    if silent:
        yield f"{_listed(silent)} get no gradient, although the process depends on them: they are detached"
    if unused:
        yield f"{_listed(unused)} get no gradient, and nothing depends on them: unused, or an input that they meet is 0"


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:4])
    return f"parameters {shown}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _slope_off(slope: float, change: Tensor, weight: Tensor, value: Tensor) -> float:
    """Returns how far a slope is from the weighted sum of finite differences, relative to the size of its terms."""
    terms = weight * change
    scale = terms.norm().item() + 1e-4 * (1 + _rms(value))
    off = abs(slope - terms.sum().item()) / scale
    return off if math.isfinite(off) else math.inf


def _second(case: _Case) -> Iterator[str]:
    start = _Inputs.of(case)
    dz, dt = case.noise(*case.eps.shape, stream=70), torch.ones_like(case.t)

    def slope(at: _Inputs) -> Tensor:
        def velocity(z: Tensor, t: Tensor) -> Tensor:
            return at.process.path_at(z, t, at.values[2]).velocity

        return torch.func.jvp(velocity, (at.values[1], case.t), (dz, dt))[1]

    _, z, x = start.values
    process = start.process
    leaves = [*start.parameters.values(), x.requires_grad_()]
    got = slope(start)
    off = math.inf
    for h in _STEPS:
        high, low = (process.path_at(z + h * sign * dz, case.t + h * sign * dt, x).velocity for sign in (1, -1))
        expected = ((high - low) / (2 * h)).detach()
        # the median, because flows may be smooth in pieces only
        off = min(off, ((got.detach() - expected).abs() / (_rms(expected) + 1e-6)).median().item())
        if off < 1e-3:
            break
    if not off < 1e-3:
        yield (
            "the derivative of path_at(z, t, x).velocity along a direction in (z, t) differs from finite differences by "
            f"{_percent(off)}: the velocity cannot be differentiated again (detach, .item(), a numerical derivative?)"
        )
        return
    weight = case.noise(*got.shape, stream=71)
    known = got.requires_grad
    gradient = torch.autograd.grad((weight * got).sum(), leaves, allow_unused=True) if known else [None] * len(leaves)
    ways = {
        name: case.noise(*one.shape, stream=80 + i) / math.sqrt(one.numel())
        for i, (name, one) in enumerate(start.parameters.items())
    }
    way = case.noise(*x.shape, stream=72)
    total = sum(
        (one * direction).sum().item()
        for one, direction in zip(gradient, [*ways.values(), way], strict=True)
        if one is not None
    )
    off = math.inf
    for h in _STEPS:
        change = start.difference(lambda at: {"slope": slope(at)}, ways, (None, None, way), h)["slope"]
        off = min(off, _slope_off(total, change, weight, got))
        if off < 1e-2:
            break
    if not off < 1e-2:
        yield (
            "the gradient of the derivative of path_at(z, t, x).velocity in (z, t), for a curvature penalty, differs from "
            f"finite differences by {_percent(off)}"
        )


_CHECKS = (
    _Check("basics", _basics),
    _Check("layers", _layers),
    _Check("attributes", _attributes),
    _Check("outcomes", _outcomes, ("basics",)),
    _Check("source", _sources, ("basics",)),
    _Check("batch", _batch, ("basics", "outcomes")),
    _Check("dtype", _dtype, ("basics", "outcomes", "attributes")),
    _Check("precision", _precision, ("basics",)),
    _Check("device", _device, ("basics", "attributes")),
    _Check("state", _state, ("basics", "outcomes")),
    _Check("round_trip", _round_trip, ("basics",)),
    _Check("log_prob", _log_prob, ("precision", "basics", "round_trip")),
    _Check("velocity", _velocity, ("precision", "basics")),
    _Check("score", _score, ("log_prob",)),
    _Check("path_at", _path_at, ("outcomes", "round_trip", "velocity", "score")),
    _Check("reference", _reference, ("outcomes",)),
    _Check("ends", _ends, ("outcomes", "source")),
    _Check("prior_kl", _prior_kl, ("ends", "log_prob")),
    _Check("ode", _ode, ("path_at",)),
    _Check("sde", _sde, ("path_at", "reference", "ends", "batch")),
    _Check("transition", _transition, ("round_trip", "reference", "ends")),
    _Check("gradients", _gradients, ("outcomes", "precision", "layers", "ends")),
    _Check("second", _second, ("gradients", "path_at")),
)

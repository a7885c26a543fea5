"""What the command line says when it is misused: one line that names the thing and lists the choices."""

import difflib
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf.errors import OmegaConfBaseException

from nfdm_lightning import callbacks, networks
from nfdm_lightning.data import DataModule, Distribution2D
from nfdm_lightning.dequantisation import Dequantisation
from nfdm_lightning.errors import NfdmError
from nfdm_lightning.features import FeatureExtractor
from nfdm_lightning.predictor import Predictor
from nfdm_lightning.processes import ConditionalFlow, ForwardProcess, Penalty, Schedule
from nfdm_lightning.solvers import Solver
from nfdm_lightning.time_sampling import TimeSampler
from nfdm_lightning.volatility import Volatility

# What may stand at a key, by the last part of its name.
_BASES: dict[str, type] = {
    "process": ForwardProcess,
    "predictor": Predictor,
    "volatility": Volatility,
    "schedule": Schedule,
    "flow": ConditionalFlow,
    "penalties": Penalty,
    "times": TimeSampler,
    "distribution": Distribution2D,
    "solver": Solver,
    "solvers": Solver,
    "features": FeatureExtractor,
    "dequantisation": Dequantisation,
    "data": DataModule,
    "target": DataModule,
    "source": DataModule,
}
LINKED = ("shape", "levels", "data_std", "num_classes")
"""What the model takes from the data."""
_OF_THE_PARSER = {"help", "config", "print_config", "print_shtab"}
_NAMED: dict[str, Sequence[str]] = {
    "network": networks.__all__,
    "callbacks": [name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), Callback)],
}


def _subclasses(base: type) -> Iterator[type]:
    children: list[type] = base.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)


def choices(key: str) -> list[str]:
    """Returns the names of the classes that may stand at a key, such as ``model.process``; empty where unknown."""
    part = key.removesuffix(".class_path").rsplit(".", 1)[-1]
    if part in _NAMED:
        return sorted(_NAMED[part])
    base = _BASES.get(part)
    if base is None:
        return []
    return sorted(
        {child.__name__ for child in _subclasses(base) if not inspect.isabstract(child) and child.__name__[0] != "_"}
    )


def _unknown_name(kind: str, name: str, accepted: Sequence[str]) -> str:
    accepted = sorted(set(accepted))
    close = difflib.get_close_matches(name, accepted, n=1)
    guess = f"; did you mean {close[0]}?" if close else ";"
    return f"{kind} {guess} choose from: {', '.join(accepted)}".replace(" ;", ";")


class Parser(LightningArgumentParser):
    """The parser of the command line: an error is one line, and exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.stderr.write(f"error: {self._explain(message, ex)}\n")
        sys.exit(2)

    def _explain(self, message: str, ex: Exception | None) -> str:
        key_match = re.search(r'Parser key "([^"]+)"', message)
        key = key_match.group(1) if key_match else ""
        if match := re.search(r"Expected a dot import path string: (\S+)", message):
            name = match.group(1)
            if names := choices(key):
                return _unknown_name(f"{key}: there is no {name!r}", name, names) + ", or a class path of your own"
        if match := re.search(r"Errors:\s+- (.*?)\s+- Expected a <class 'NoneType'>", message, re.DOTALL):
            message = f"{key}: {match.group(1)}"
        if match := re.search(r"No module named '([^']+)'", message):
            return f"{key}: there is no module {match.group(1)!r} in the working directory or among the installed packages"
        if match := re.search(r"Option '([^']+)' is not accepted", message):
            name = match.group(1)
            if accepted := _innermost_options(ex.__traceback__ if ex else None):
                return _unknown_name(f"{name!r} is not an argument there", name, accepted)
        if match := re.search(r"unrecognized arguments: (.+)|does not accept option '([^']+)'", message):
            unknown = (match.group(1) or match.group(2)).split()[0]
            return self._unknown_key(unknown.split("=")[0].lstrip("-"))
        return " ".join(re.sub(r'Parser key "([^"]+)":', r"\1:", message).split())[:500]

    def _unknown_key(self, key: str) -> str:
        action = self._subcommands_action
        parser = next(iter(action._name_parser_map.values())) if action else self
        accepted = {option.dest for option in parser._actions if isinstance(option.dest, str)} - {
            f"model.{name}" for name in LINKED
        }
        parts = key.split(".")
        for depth in range(len(parts)):
            prefix = "".join(f"{part}." for part in parts[:depth])
            there = {name[len(prefix) :].split(".")[0] for name in accepted if name.startswith(prefix)}
            if parts[depth] not in there:
                return _unknown_name(
                    f"there is no {'.'.join(parts[: depth + 1])!r}",
                    parts[depth],
                    sorted(there - _OF_THE_PARSER | {"config"} if not prefix else there),
                )
        return f"unknown option --{key}"


def _innermost_options(traceback: TracebackType | None) -> list[str]:
    """Returns the arguments that the parser of the class in question accepts: it is on the stack of the error."""
    accepted: list[str] = []
    while traceback is not None:
        parser = traceback.tb_frame.f_locals.get("self")
        if isinstance(parser, ArgumentParser):
            names = [option.dest for option in parser._actions if isinstance(option.dest, str)]
            accepted = sorted({name.split(".")[0] for name in names} - _OF_THE_PARSER)
        traceback = traceback.tb_next
    return accepted


def is_state_mismatch(error: BaseException) -> bool:
    """Whether the weights of a checkpoint did not fit the model."""
    return isinstance(error, RuntimeError) and "Error(s) in loading state_dict" in str(error)


def own_error(error: BaseException) -> BaseException:
    """Returns the error of this package that an error was made of, as the parser does where it builds a part; or itself."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, NfdmError):
        found = found.__cause__
    return error if found is None else found


def one_line(error: BaseException) -> str | None:
    """Returns an error as one line, or None for one that is not known, whose traceback is of use."""
    text = " ".join(str(error).split())
    if is_state_mismatch(error):
        return f"the checkpoint is of another model: use the configuration that it was trained with ({text[:300]})"
    known = (NfdmError, MisconfigurationException, OmegaConfBaseException)
    if isinstance(error, (RuntimeError, ValueError)) and not isinstance(error, known):
        return None
    return text


def _nodes(config: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every {class_path, init_args} of a configuration with its key."""
    if isinstance(config, dict):
        if "class_path" in config:
            yield key, config
        for name, value in config.items():
            yield from _nodes(value, key if name == "init_args" else f"{key}.{name}".lstrip("."))


def warn_of_kept_arguments(config: dict[str, Any], sources: list[tuple[str, Any]]) -> None:
    """Warns where a class was swapped and kept arguments of the one before that differ from its own defaults.

    Args:
        config: the final configuration of the subcommand.
        sources: the configuration files in the order in which they were read, each with its content.
    """
    final = dict(_nodes(config))
    for path, content in sources:
        for key, node in _nodes(content):
            new = final.get(key)
            if new is None:
                continue
            kind = _class(new["class_path"])
            if str(node["class_path"]).split(".")[-1] in [parent.__name__ for parent in kind.__mro__]:
                continue  # the same, or a class derived from it
            defaults = _defaults(kind)
            for name, value in (node.get("init_args") or {}).items():
                kept = (new.get("init_args") or {}).get(name)
                same_class = isinstance(value, dict) and isinstance(kept, dict) and "class_path" in value
                if kept is None or name not in defaults or not (same_class or kept == value):
                    continue
                if _short(value) == _short(defaults[name]) and not (same_class and value.get("init_args")):
                    continue
                warnings.warn(
                    f"{key}: {new['class_path'].split('.')[-1]} keeps {name}={_short(value)} of the "
                    f"{str(node['class_path']).split('.')[-1]} in {path} (its own default is {_short(defaults[name])}); "
                    f"set --{key}.{name} to choose",
                    stacklevel=2,
                )


def _class(class_path: str) -> type:
    module, _, name = class_path.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _defaults(kind: type) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters
    return {key: parameter.default for key, parameter in parameters.items() if parameter.default is not parameter.empty}


def _short(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).split(".")[-1]
    return getattr(value, "__name__", repr(value))

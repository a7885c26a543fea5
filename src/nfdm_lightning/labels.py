"""Class labels: how batches carry them, how parts are told of them, and how networks are built for them and evaluated.

A label is one of 0 .. num_classes - 1, or num_classes itself, which stands for "no label". What is conditional is given its
labels as an argument or as a view of itself with the same weights (:meth:`Conditioned.given`), never by a global state: a
network may be evaluated again later, for a checkpointed gradient.
"""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from nfdm_lightning.errors import ConfigError


class Labelled(NamedTuple):
    """A batch with labels.

    Attributes:
        samples: (B, *event).
        labels: (B,), int64.
    """

    samples: Tensor
    labels: Tensor


Batch: TypeAlias = Tensor | Labelled

_Part = TypeVar("_Part")


def unpack(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Returns the samples of a batch, (B, *event), and their labels, (B,), or None."""
    return (batch.samples, batch.labels) if isinstance(batch, Labelled) else (batch, None)


def no_label(like: Tensor, num_classes: int) -> Tensor:
    """Returns the label "no label" for each of some samples, (B,), on their device."""
    return torch.full((len(like),), num_classes, dtype=torch.long, device=like.device)


def _built_by(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the class or function behind a partial."""
    if not isinstance(factory, partial):
        return factory
    # what jsonargparse makes of {class_path, init_args} has the class behind its own instantiator
    return factory.args[-1] if factory.args and isinstance(factory.args[-1], type) else factory.func


def takes_labels(factory: Callable[..., Any]) -> bool:
    """Whether a class, a partial of one or a function that builds a part has the argument ``num_classes``."""
    parameters = inspect.signature(_built_by(factory)).parameters.values()
    return any(p.name == "num_classes" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def build_part(factory: Callable[..., _Part], shape: tuple[int, ...], num_classes: int | None) -> _Part:
    """Returns a process or flow of a shape, which sees labels if there are classes and if it has the argument."""
    if num_classes is None or not takes_labels(factory):
        return factory(shape)
    return factory(shape, num_classes=num_classes)


def build_network(
    factory: Callable[..., nn.Module],
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    num_classes: int | None,
) -> nn.Module:
    """Returns a network n(x, t), or n(x, t, label) where there are classes.

    Args:
        factory: builds it from the two shapes and, where there are classes, the keyword ``num_classes``.
        in_shape: event shape of the input.
        out_shape: event shape of the output.
        num_classes: number of classes; None for a network without labels.

    Raises:
        ConfigError: there are classes, and the network takes none.
    """
    if num_classes is None:
        return factory(in_shape, out_shape)
    if not takes_labels(factory):
        raise ConfigError(
            f"the network {getattr(_built_by(factory), '__qualname__', factory)} takes no labels: give it an init argument "
            "num_classes and a forward(x, t, label), as ResidualMLP has, or set data.labels=false"
        )
    return factory(in_shape, out_shape, num_classes=num_classes)


def call_network(network: nn.Module, x: Tensor, t: Tensor, label: Tensor | None, num_classes: int | None) -> Tensor:
    """Returns n(x, t), or n(x, t, label) where there are classes; no label is the label ``num_classes``, one serves all."""
    if num_classes is None:
        return network(x, t)
    label = no_label(x, num_classes) if label is None else label.to(x.device).expand(len(x))
    return network(x, t, label)


def _given(module: nn.Module | None, label: Tensor | None) -> nn.Module | None:
    """Returns a view of a module in which every conditioned part is given the label: of a list of them, too."""
    if isinstance(module, Conditioned):
        return module.given(label)
    if module is None or not any(isinstance(part, Conditioned) for part in module.modules()):
        return module
    view = copy.copy(module)
    view._modules = {name: _given(child, label) for name, child in module._modules.items()}  # the copy shares the original's
    return view


class Conditioned(nn.Module):
    """Base of the parts whose networks may see labels: forward processes and flows.

    Args:
        num_classes: number of classes; None for a part that takes no labels.
    """

    label: Tensor | None = None
    """What the part is given, (B,), or (1,) for all samples alike; None is no label."""

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes

    def given(self, label: Tensor | None) -> Self:
        """Returns this part, with the same weights, under labels, (B,) or (1,); None is no label."""
        if label is None and self.label is None:
            return self
        conditioned = copy.copy(self)
        conditioned.label = label
        conditioned._modules = {name: _given(child, label) for name, child in self._modules.items()}
        return conditioned

    def call_network(self, network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        """Returns the output of one of this part's networks under its labels: the one way in which they are evaluated."""
        return call_network(network, x, t, self.label, self.num_classes)

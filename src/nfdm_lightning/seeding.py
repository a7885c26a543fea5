"""Random numbers that depend on what they are for and on nothing else."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""CPU generators: one for a batch, or one for each of its samples; None is torch's global one."""


def mixed_seed(*parts: int) -> int:
    """Returns a seed for torch's CPU generator, which uses 32 bits, that depends on every part."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def generators(index: Tensor, *parts: int) -> list[torch.Generator]:
    """Returns a CPU generator for each sample, seeded by the parts and the sample's place in its data set, (B,)."""
    return [torch.Generator().manual_seed(mixed_seed(*parts, place)) for place in index.tolist()]


def standard_normal(shape: tuple[int, ...], dtype: torch.dtype, generator: Generators) -> Tensor:
    """Returns standard normal draws on the CPU; with a generator for each sample, whatever the batch that it is in."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
    return torch.stack([torch.randn(shape[1:], generator=own, dtype=dtype, device="cpu") for own in generator])

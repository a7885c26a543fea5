"""Weights shared out over the processes by torch's FSDP2, for Lightning's ModelParallelStrategy.

Every process keeps its part of each parameter, of its gradient, its average and what the optimiser knows of it. Forward-mode
autodiff and rank-zero callbacks cannot wait for collectives, so they never meet one: a training step has everything whole
from its beginning, but for the predictor's network, each block of which is gathered when it is called; and an evaluation
gathers everything once.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from nfdm_lightning.errors import ConfigError


def is_sharded(model: nn.Module) -> bool:
    """Returns whether the weights of a model are shared out over the processes."""
    return isinstance(model, FSDPModule)


def shard(model: nn.Module, network: nn.Module | None, methods: tuple[str, ...], device: torch.device) -> None:
    """Shares out the weights of rank 0 over all processes.

    Args:
        model: what is trained; nothing happens if that was done before.
        network: a part that is only ever called, never differentiated in t: it and the blocks in its ModuleLists are
            gathered when they are called.
        methods: of the model, at the beginning of which the weights of all the rest are made whole.
        device: this process's.

    Raises:
        ConfigError: a parameter is a scalar, which cannot be shared out.
    """
    if is_sharded(model):
        return
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise ConfigError(
                f"ModelParallelStrategy cannot share out the scalar parameter '{name}': give it the shape (1,), or use ddp"
            )
    for tensor in (*model.parameters(), *model.buffers()):
        value = tensor.detach().to(device)
        torch.distributed.broadcast(value, src=0)
        tensor.detach().copy_(value)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    if network is not None:
        for blocks in network.children():
            for block in blocks if isinstance(blocks, nn.ModuleList) else ():
                fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(model, method)


def gather_parts(model: nn.Module) -> None:
    """Makes whole, and keeps so, the parts of a model that are otherwise gathered when they are called."""
    for part in _parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def release(model: nn.Module) -> None:
    """Goes back to this process's share of every weight, if the model is sharded."""
    if isinstance(model, FSDPModule):
        for part in _parts(model):
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
        model.reshard()


def _parts(model: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in model.modules() if isinstance(part, FSDPModule) and part is not model)


@contextlib.contextmanager
def for_training() -> Iterator[None]:
    """Weights gathered inside can take part in training later, even if an evaluation has turned autograd off."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def share_like(copy: nn.Module, model: nn.Module) -> None:
    """Replaces the parameters of a copy of a model by copies of this process's shares of the model's."""
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(copy.get_submodule(owner), last, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


def local(tensor: Tensor) -> Tensor:
    """Returns this process's share of a tensor, with the same memory; an ordinary tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state with every tensor whole and on the CPU, on rank 0; empty on the others. Every process must call it."""
    whole = {}
    for name, value in state.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if torch.distributed.get_rank() == 0:
            whole[name] = full.cpu()
    return whole


def load_whole_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Gives a sharded model its shares of a state of whole tensors."""
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))

"""Checksums of tensors: keys for what is computed from them, and guards of what is stored."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensors_md5(tensors: Mapping[str, Tensor], label: str = "") -> str:
    """Returns the MD5 of named tensors: of names, types, shapes and values, whatever their order, device or layout.

    Args:
        tensors: what is summed up.
        label: what they belong to, summed up too.
    """
    digest = hashlib.md5(label.encode(), usedforsecurity=False)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

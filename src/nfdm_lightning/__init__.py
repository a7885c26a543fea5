"""Diffusion models with learnable forward processes (NDM, NFDM) as PyTorch Lightning plug-ins."""

__version__ = "0.1.0"

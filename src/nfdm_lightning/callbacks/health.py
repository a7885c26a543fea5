"""Stops a run at the first loss or gradient that is not finite, before it reaches the weights, and says where it arose."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from nfdm_lightning.errors import NonFiniteError
from nfdm_lightning.module import NeuralDiffusion

_WAY_OUT = (
    "the weights are those of the step before. Try a lower --model.lr, --trainer.gradient_clip_val=1 or full precision"
)


class HealthCheck(Callback):
    """Stops at the first non-finite loss, naming term or penalty, time, sample and process, and at the first gradient that
    is not finite, naming the parameter.

    Raises:
        NonFiniteError: before the optimiser has used the value.
    """

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if torch.isfinite(loss):
            return
        raise NonFiniteError(f"step {trainer.global_step}: {_culprit(pl_module)}; {_WAY_OUT}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # float16: the scaler looks for overflows itself, and skips these steps
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            return
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                raise NonFiniteError(
                    f"step {trainer.global_step}: the gradient of '{name}' ({_process(pl_module)}) is not finite, though "
                    f"the loss is; {_WAY_OUT}"
                )


def _process(pl_module: LightningModule) -> str:
    return type(pl_module.reverse.process).__name__ if isinstance(pl_module, NeuralDiffusion) else "model"


def _culprit(pl_module: LightningModule) -> str:
    terms = pl_module.last_terms if isinstance(pl_module, NeuralDiffusion) else None
    if not isinstance(pl_module, NeuralDiffusion) or terms is None:
        return "the loss is not finite"
    for name, values in terms.named().items():
        bad = ~torch.isfinite(values)
        if bad.any():
            first = int(bad.int().argmax())
            at = f"at t={float(terms.t[first]):.6g} " if name == "diffusion" else ""
            return (
                f"the {name} term of {_process(pl_module)} is {float(values[first])} {at}for sample {first} of the batch "
                f"({int(bad.sum())} of {len(values)} samples)"
            )
    for name, cost in pl_module.last_penalties.items():
        if not torch.isfinite(cost):
            return f"the penalty '{name}' on {_process(pl_module)} is {float(cost)}"
    return f"the mean loss of {_process(pl_module)} is not finite, though every term is: the sum overflows"

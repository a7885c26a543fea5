"""Exponential moving average of the weights, by Lightning's own weight averaging."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.sharding import is_sharded, load_whole_state, local, release, share_like, whole_state


class EMA(WeightAveraging):
    r"""Averages the weights, evaluates and samples with the average, and saves both.

    .. math:: \bar\theta \leftarrow d_n \bar\theta + (1 - d_n)\,\theta, \qquad d_n = \min\big(d, \tfrac{1 + n}{10 + n}\big)

    In a checkpoint, ``state_dict`` is the average and ``current_model_state`` the raw weights, as Lightning lays it out.
    Three things differ from Lightning's ``EMAWeightAveraging``: the decay warms up, so that short runs forget their
    initial weights; every callback of a validation sees the average, to its very end; and the average is released after
    the fit, so that a following ``trainer.test`` evaluates what it loads.

    Args:
        decay: d; 0 keeps the raw weights.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema.decay={decay} must lie in [0, 1)")
        self.decay = decay
        self._swapped = False
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # a second fit with the same object starts anew; a resumed one restores these afterwards
            self._latest_update_step, self._latest_update_epoch, self._swapped = 0, -1, False
            if is_sharded(pl_module):
                raise ConfigError("the model has been sharded by an earlier fit, and its average cannot be: build it anew")
            # not by Lightning's own, which asks for the sharding first, and torch does not copy what is sharded
            self._average_model = AveragedModel(
                pl_module, device=pl_module.device, use_buffers=False, multi_avg_fn=self._average
            )
            # the model itself is converted to the trainer's precision after this hook
            trainer.precision_plugin.convert_module(self._average_model)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        self._average_model.to(pl_module.device)  # at setup the model was not on its device yet
        # read in each update: on the CPU, or each would wait for the device
        self._average_model.n_averaged = self._average_model.n_averaged.cpu()
        if is_sharded(pl_module):
            share_like(self._average_model.module, pl_module)

    @torch.no_grad()
    def _average(self, averages: Sequence[Tensor], currents: Sequence[Tensor], updates: Tensor | int) -> None:
        n = int(updates)
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_([local(value) for value in averages], [local(value) for value in currents], 1 - decay)

    def _swap(self, pl_module: LightningModule) -> None:
        if self._average_model is not None:
            release(pl_module)
            self._swap_models(pl_module)
            self._swapped = not self._swapped

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass  # swapped already

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass  # later callbacks still draw and measure

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass  # the last checkpoint, written after this hook, still needs the raw weights

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average_model is not None:
            self._copy_average_to_current(pl_module)
            self._average_model = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._swapped:
            self._swap(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        swapped = self._swapped
        if swapped:
            self._swap(pl_module)
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if is_sharded(pl_module) and self._average_model is not None:
            checkpoint["state_dict"] = whole_state(checkpoint["state_dict"])
        if swapped:  # the tensors above are views of the weights: keep their values before swapping back
            for key in ("state_dict", "current_model_state"):
                checkpoint[key] = {name: value.clone() for name, value in checkpoint[key].items()}
            self._swap(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # the loaded weights are the average already
            return
        if is_sharded(pl_module):
            self._load_shares(pl_module, checkpoint)
        else:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _load_shares(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert self._average_model is not None
        share_like(self._average_model.module, pl_module)  # what the strategy has loaded is the average
        if "current_model_state" in checkpoint:
            load_whole_state(pl_module, checkpoint["current_model_state"])
            self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])

"""The LightningModule: wires process, predictor, volatility and decoder, and trains them on the bound."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from nfdm_lightning.bound import BoundTerms, Draws, bits_per_dim, random_draws, variational_bound
from nfdm_lightning.decoder import Decoder, DiscreteDecoder, GaussianDecoder
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.labels import Batch, Labelled, build_part, no_label, unpack
from nfdm_lightning.predictor import DataSpec, Predictor, XPrediction
from nfdm_lightning.processes import NFDM, ForwardProcess, Penalty
from nfdm_lightning.processes.base import AffineProcess, Shape
from nfdm_lightning.reverse import ReverseProcess, check_time_differentiable
from nfdm_lightning.seeding import Generators, mixed_seed
from nfdm_lightning.sharding import for_training, gather_parts, is_sharded, release, shard
from nfdm_lightning.solvers import Ancestral, Solution, Solver
from nfdm_lightning.time_sampling import LowDiscrepancyTimes, TimeSampler
from nfdm_lightning.volatility import LearnedVolatility, Volatility

_DROPOUT = 0xD0  # ends the seeds of dropout
_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


class NeuralDiffusion(LightningModule):
    """A diffusion model with an interchangeable forward process.

    Every part is given as something to call: a class, or a ``functools.partial`` of one, in Python; a class name with
    ``init_args`` in YAML. The data's shape, levels, scale and number of classes are filled in by the command line from the
    DataModule.

    .. code-block:: python

        model = NeuralDiffusion(shape=(2,), process=partial(NFDM, delta=1e-2), decoder_std=0.01)

    Args:
        shape: event shape of the data, (D,) or (C, H, W).
        levels: number of levels of discrete data in [-1, 1]; None for continuous data.
        data_std: standard deviation of the data per dimension.
        process: builds the forward process from the shape (and the number of classes, if it sees labels).
        predictor: builds x_hat(z, t) from shape, levels, scale and number of classes of the data.
        volatility: builds g(t).
        decoder_std: for continuous data, the standard deviation of p(x | z_0); None takes the process's noise at t = 0.
        lr: peak learning rate of AdamW.
        process_lr: the same for the parameters of the forward process; None is ``lr``.
        weight_decay: of AdamW.
        warmup_steps: steps of linear warm-up.
        decay: how the learning rates fall over the run: to a hundredth by a half ``cosine`` or a ``linear`` line, or not at
            all, ``constant``.
        betas: of AdamW.
        penalties: costs on the paths, added to the bound in training: Curvature, Obstacle, or a Penalty of your own.
        discrete_steps: T, to train and evaluate the bound of T discrete steps (NDM's first formulation; sample it with
            ``Ancestral`` in T evaluations); None is continuous time.
        times: draws the times in training: LowDiscrepancyTimes, AdaptiveTimes (importance sampling) or UniformTimes.
            Evaluation has uniform times, spread out.
        antithetic: whether the second half of a training batch has the noise of the first with the opposite sign.
        channels_last: whether convolutions keep images with their channels last, which is faster on a GPU.
        compile: whether training runs the predictor's network through ``torch.compile``; the forward process, which is
            differentiated in t, is never compiled.
        checkpoint_process: whether the backward pass evaluates the forward process anew instead of keeping its activations:
            less memory, more time. The predictor's network has a switch of its own, ``checkpointing``.
        num_classes: number of classes, for a conditional model of data with labels; None for data without.
        label_dropout: for a conditional model, the share of training samples whose label is hidden from process and
            predictor: what guidance needs.

    Raises:
        ConfigError: the shape is missing or not a shape, or a part does not fit the data.
    """

    def __init__(
        self,
        shape: Shape,
        levels: int | None = None,
        data_std: float = 1.0,
        process: Callable[[Shape], ForwardProcess] = NFDM,
        predictor: Callable[[DataSpec], Predictor] = XPrediction,
        volatility: Callable[[], Volatility] = LearnedVolatility,
        decoder_std: float | None = None,
        lr: float = 1e-3,
        process_lr: float | None = None,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        decay: Literal["cosine", "linear", "constant"] = "cosine",
        betas: tuple[float, float] = (0.9, 0.99),
        penalties: list[Callable[[], Penalty]] | None = None,
        discrete_steps: int | None = None,
        times: Callable[[], TimeSampler] = LowDiscrepancyTimes,
        antithetic: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        checkpoint_process: bool = False,
        num_classes: int | None = None,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if shape is None or len(shape) not in (1, 3) or min(shape) < 1:
            raise ConfigError(f"model.shape={shape} is no event shape, (D,) or (C, H, W); the DataModule must define it")
        if data_std is None or not data_std > 0:
            raise ConfigError(f"model.data_std={data_std} must be positive; the DataModule must define it")
        if levels is not None and decoder_std is not None:
            raise ConfigError(
                f"model.decoder_std={decoder_std} is for continuous data, but these have {levels} levels: remove it"
            )
        if discrete_steps is not None and discrete_steps < 1:
            raise ConfigError(f"model.discrete_steps={discrete_steps} must be at least 1, or null for continuous time")
        if num_classes is not None and num_classes < 1:
            raise ConfigError(f"model.num_classes={num_classes} must be at least 1, or null for data without labels")
        if not 0 <= label_dropout < 1:
            raise ConfigError(f"model.label_dropout={label_dropout} must lie in [0, 1)")
        shape = tuple(shape)
        self._save_hparams(locals())
        built = build_part(process, shape, num_classes)
        if num_classes is None and built.num_classes is not None:
            raise ConfigError(
                f"model.process.num_classes={built.num_classes}, but the data have no labels: remove it, and set "
                "data.labels=true for a conditional model"
            )
        data = DataSpec(shape, levels, data_std, built.takes_source, num_classes)
        self.reverse = ReverseProcess(built, predictor(data), volatility())
        self.penalties = [*built.penalties, *(penalty() for penalty in penalties or [])]
        for penalty in self.penalties:
            if penalty.takes_derivatives:
                owner = f"{type(penalty).__name__} differentiates the predictor"
                check_time_differentiable(self.reverse.predictor, owner, deterministic=False)
                if compile:
                    raise ConfigError(f"model.compile=true: {owner} in t, which torch cannot compile: set compile to false")
        self.discrete_steps = discrete_steps
        self.times, self.antithetic = times(), antithetic
        if checkpoint_process and not isinstance(built, AffineProcess):
            raise ConfigError(
                f"model.checkpoint_process=true: {type(built).__name__} is not affine in the noise, and torch cannot "
                "checkpoint the gradient that its score takes: set it to false"
            )
        self.reverse.checkpoint_process = checkpoint_process
        if channels_last:
            self.to(memory_format=torch.channels_last)
        self.decoder: Decoder = GaussianDecoder(decoder_std) if levels is None else DiscreteDecoder(levels)
        self._seed: int | None = None
        self._gathered = False
        self.last_terms: BoundTerms | None = None
        """The terms of the latest training step, for callbacks that look into them."""
        self.last_penalties: dict[str, Tensor] = {}
        """The costs of the penalties in that step, by name."""

    def _save_hparams(self, arguments: dict[str, Any]) -> None:
        # The command line hands over its own record; a model built in Python is described in the same form, so that
        # load_from_checkpoint rebuilds both, and no object is ever pickled into a checkpoint.
        if _given_hyperparameters.get() is not None:
            self.save_hyperparameters()
            return
        skipped = ("self", "__class__")
        described = {name: describe(value) for name, value in arguments.items() if name not in skipped}
        self.save_hyperparameters({**described, "_instantiator": _INSTANTIATOR})

    @property
    def dimensions(self) -> int:
        """Number D of data dimensions."""
        return int(torch.Size(self.reverse.shape).numel())

    @property
    def num_classes(self) -> int | None:
        """Number of classes of a conditional model, else None."""
        return self.reverse.predictor.num_classes

    def bound(self, batch: Batch, draws: Draws | None = None) -> BoundTerms:
        """Returns one draw of the bound's terms for each sample of a batch; random draws unless given.

        Args:
            batch: data, (B, *event), or pairs of data and source, (B, 2, *event), for a bridge; with their labels for a
                conditional model, whose bound is on -log p(x | label).
            draws: the random numbers.
        """
        x, label = self.unpack(batch)
        x = x.to(self.dtype)  # normalised after the trainer has converted the batch to its precision
        draws = draws or random_draws(self.reverse.process.split(x)[0])
        with self.reverse.full_precision(x.device):
            return variational_bound(self.reverse, self.decoder, x, draws, self.discrete_steps, label)

    def target(self, batch: Batch) -> Tensor:
        """Returns what is to be generated, (B, *event): the samples, or the first of each pair for a bridge."""
        x, _ = unpack(batch)
        self._check(x)
        return self.reverse.process.split(x)[0]

    def unpack(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Returns samples, (B, *event), and labels, if there are any, of a batch that fits the model."""
        x, label = unpack(batch)
        self._check(x)
        if label is None and self.num_classes is not None:
            raise ConfigError(f"the model is conditional on {self.num_classes} classes: it needs data.labels=true")
        if label is not None and self.num_classes is None:
            raise ConfigError("the data have labels, but the model is not conditional: set data.labels=false")
        return x, label

    def _check(self, batch: Tensor) -> None:
        shape, bridge = self.reverse.shape, self.reverse.process.takes_source
        if batch.shape[1:] == ((2, *shape) if bridge else shape):
            return
        name = type(self.reverse.process).__name__
        if bridge and batch.shape[1:] == shape:
            raise ConfigError(f"{name} is a bridge and needs pairs of data and source: use --data=Pairs")
        if not bridge and batch.shape[1:] == (2, *shape):
            raise ConfigError(f"{name} is not a bridge, but the data are pairs: use --model.process=Bridge, or other data")
        raise ConfigError(
            f"the model is for {'pairs of ' if bridge else ''}data of shape {shape}, got a batch of {tuple(batch.shape)}"
        )

    def setup(self, stage: str) -> None:
        if isinstance(self.trainer.precision_plugin, HalfPrecision):
            raise ConfigError(
                f"trainer.precision={self.trainer.precision} rounds the times and the noise themselves, which spoils the "
                "bound: use bf16-mixed, which keeps the forward process in float32"
            )
        strategy = self.trainer.strategy
        if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise ConfigError(
                f"trainer.strategy={type(strategy).__name__} flattens the weights, of which the average and the samplers "
                "need each by itself: use ModelParallelStrategy, which shards them one by one, or ddp"
            )
        if isinstance(strategy, ModelParallelStrategy):
            self._check_sharding(strategy)

    def _check_sharding(self, strategy: ModelParallelStrategy) -> None:
        if strategy._save_distributed_checkpoint:
            raise ConfigError(
                "ModelParallelStrategy would write folders of shares as checkpoints, and those of a run are single files: "
                "add --trainer.strategy.save_distributed_checkpoint=false"
            )
        if self.hparams["channels_last"]:
            rank_zero_warn("ModelParallelStrategy keeps weights in their ordinary layout: channels_last has no effect")

    def configure_model(self) -> None:
        if self.device_mesh is None:  # set by ModelParallelStrategy alone
            return
        if self.hparams["channels_last"]:
            self.to(memory_format=torch.contiguous_format)
        differentiated = any(penalty.takes_derivatives for penalty in self.penalties)
        network = None if differentiated else self.reverse.predictor.network
        shard(self, network, ("training_step", "_gather"), self.trainer.strategy.root_device)

    def gather_weights(self) -> None:
        """Makes sharded weights whole on every process until :meth:`release_weights`; every process must call it."""
        if is_sharded(self):
            self._gathered = True
            with for_training():
                self._gather()

    def _gather(self) -> None:
        gather_parts(self)

    def release_weights(self) -> None:
        """Goes back to each process's share of sharded weights."""
        self._gathered = False
        release(self)

    def on_fit_start(self) -> None:
        if self.hparams["compile"]:
            self.reverse.predictor.network.compile()
        if self._seed is None:
            self._seed = torch.initial_seed() % 2**31

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["nfdm_seed"] = self._seed
        checkpoint["nfdm_times"] = {"kind": type(self.times).__qualname__, **self.times.state_dict()}
        if self._gathered:  # amid an evaluation: saving has released the weights
            self.gather_weights()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._seed = checkpoint.get("nfdm_seed")
        learned = dict(checkpoint.get("nfdm_times", {}))
        if learned.pop("kind", None) == type(self.times).__qualname__:  # another sampler starts anew
            self.times.load_state_dict(learned)
        for state in checkpoint.get("optimizer_states", []):  # an earlier version had the groups the other way round
            state["param_groups"].sort(key=lambda group: group.get("name", ""))

    def on_train_start(self) -> None:
        # a resumed optimiser and scheduler bring the learning rate of the stopped run: the one now asked for counts
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, LambdaLR):
            wanted = [group["lr"] for group in self._parameter_groups()]
            if scheduler.base_lrs != wanted:
                scheduler.base_lrs = wanted
                for lr, group in zip(wanted, scheduler.optimizer.param_groups, strict=True):
                    group["initial_lr"] = lr
                    group["lr"] = lr * scheduler.lr_lambdas[0](scheduler.last_epoch)

    def step_generator(self) -> torch.Generator:
        """Returns the random numbers of the current training step.

        A function of seed, number of batches seen and rank, so that a resumed run draws what the stopped one would have.
        """
        return torch.Generator().manual_seed(self._step_seed())

    def _step_seed(self, *use: int) -> int:
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        assert self._seed is not None
        return mixed_seed(self._seed, batches, self.global_rank, *use)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        torch.manual_seed(self._step_seed(_DROPOUT))  # dropout draws from the global generators
        (x, label), generator = self.unpack(batch), self.step_generator()
        target = self.target(x)
        draws = random_draws(target.to(self.dtype), generator, self.times, self.antithetic)
        if label is not None:
            batch = Labelled(x, self._hide(label, generator))
        with self.reverse.full_precision(target.device):
            terms = self.bound(batch, draws)
            loss = terms.nats.mean() + self._penalty(batch, terms)
        self.last_terms = terms.detach()
        self.times.observe(draws.t, self.last_terms.diffusion / terms.weight)
        bits = bits_per_dim(terms.nats.detach().mean(), self.dimensions)
        self.log("train/bits_per_dim", bits, prog_bar=True, batch_size=len(target))
        self.log_dict(
            {f"train/{name}_nats": term.detach().mean() for name, term in terms.named().items()}, batch_size=len(target)
        )
        return (
            loss / self.dimensions
        )  # per dimension for the optimiser alone: gradient clipping then means the same for any size

    def _hide(self, label: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the labels, (B,), each replaced by that of no label with the probability of the label dropout."""
        hidden = torch.rand(len(label), generator=generator, dtype=torch.float64) < self.hparams["label_dropout"]
        return torch.where(hidden.to(label.device), no_label(label, self.num_classes or 0), label)

    def _penalty(self, batch: Batch, terms: BoundTerms) -> Tensor:
        total = terms.nats.new_zeros(())
        self.last_penalties = {}
        if not self.penalties:
            return total
        x, label = unpack(batch)
        source = self.reverse.process.split(x.to(self.dtype))[1]
        for penalty in self.penalties:
            part = math.ceil(penalty.fraction * len(x))  # the times are in random order
            source_part, label_part = (None if given is None else given[:part] for given in (source, label))
            reverse = self.reverse.given(source_part, label_part)
            cost = (penalty.cost(reverse, terms.z[:part], terms.t[:part]) * terms.weight[:part]).mean()
            name = penalty.name if penalty.name not in self.last_penalties else f"{penalty.name}_{len(self.last_penalties)}"
            self.last_penalties[name] = cost.detach()
            self.log(f"train/{name}", cost.detach(), batch_size=part)
            total = total + penalty.weight_at(self.global_step) * cost
        return total

    # callbacks evaluate as often as they like, some on one process alone: with sharded weights, no collective may be left
    def on_validation_start(self) -> None:
        self.gather_weights()

    def on_validation_epoch_end(self) -> None:
        self.release_weights()

    def on_test_start(self) -> None:
        self.gather_weights()

    def on_test_end(self) -> None:
        self.release_weights()

    def on_predict_start(self) -> None:
        self.gather_weights()

    def on_predict_end(self) -> None:
        self.release_weights()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluation is the callbacks' work, see :class:`nfdm_lightning.callbacks.NLL`."""

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluation is the callbacks' work, see :class:`nfdm_lightning.callbacks.NLL`."""

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the bound of each sample in nats, (B,), from one draw."""
        return self.bound(batch).nats

    @torch.no_grad()
    def sample(
        self,
        number: int,
        solver: Solver | None = None,
        generator: Generators = None,
        trajectory: bool = False,
        source: Tensor | None = None,
        label: Tensor | None = None,
        guidance: float = 1.0,
    ) -> tuple[Tensor, Solution]:
        """Draws samples.

        Args:
            number: how many.
            solver: how; by default the SDE in 100 steps.
            generator: CPU generator of the random numbers, or one for each sample, which then does not depend on the rest.
            trajectory: whether the solution keeps every state.
            source: for a bridge, the source samples to start from, (number, *event).
            label: for a conditional model, the labels, (number,); None samples without labels.
            guidance: weight w of classifier-free guidance, x_hat without label + w (x_hat given the label - the former): 1
                is the plain conditional model, any other weight takes two evaluations of the predictor in place of one.

        Returns:
            The samples, (number, *event), in the data's range, and the solver's solution.

        Raises:
            ConfigError: source, labels or guidance do not fit the model.
        """
        if source is not None:
            if source.shape != (number, *self.reverse.shape):
                expected = (number, *self.reverse.shape)
                raise ConfigError(f"the source samples have shape {tuple(source.shape)}; {expected} was expected")
            source = source.to(next(self.parameters()))
        reverse = self.reverse.given(source, self._check_label(number, label, guidance), guidance)
        if isinstance(generator, Sequence) and len(generator) != number:
            raise ConfigError(f"{len(generator)} generators for {number} samples: give one, or one for each sample")
        z = reverse.prior(number, generator)
        with reverse.full_precision(z.device):
            solution = (solver or Ancestral()).solve(reverse, z, generator, trajectory)
        solution = replace(solution, nfe=solution.nfe * reverse.evaluations)
        alpha, _ = self.reverse.process.reference_at_data(z)
        return self.decoder.mode(solution.z, alpha), solution

    def labels_in_turn(self, number: int, classes: Sequence[int] | None = None) -> Tensor | None:
        """Returns labels for samples, (number,): the classes in turn, all unless given; None if the model has no classes."""
        if self.num_classes is None:
            return None
        chosen = torch.tensor(range(self.num_classes) if classes is None else classes, dtype=torch.long)
        return chosen[torch.arange(number) % len(chosen)]

    def _check_label(self, number: int, label: Tensor | None, guidance: float) -> Tensor | None:
        """Returns labels on the model's device."""
        classes = self.num_classes
        if classes is None and (label is not None or guidance != 1):
            raise ConfigError(
                "the model is not conditional: it takes neither labels nor guidance; train with data.labels=true"
            )
        if not math.isfinite(guidance):
            raise ConfigError(f"guidance={guidance} must be finite")
        if guidance != 1 and (label is None or self.hparams["label_dropout"] == 0):
            reason = "labels" if label is None else "a model trained with model.label_dropout above 0"
            raise ConfigError(f"guidance={guidance:g} needs {reason}")
        if label is None or classes is None:
            return None
        if label.shape != (number,):
            raise ConfigError(f"the labels have shape {tuple(label.shape)}; {(number,)} was expected")
        if label.is_floating_point() or bool(((label < 0) | (label > classes)).any()):
            raise ConfigError(f"labels must be whole numbers from 0 to {classes - 1}, or {classes} for none")
        return label.to(self.device, torch.long)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the parameters of the forward, where there are any, and the reverse process, with their peak rates.

        In the order of the module's parameters, by which ModelParallelStrategy understands the state of an optimiser.
        """
        hp, process = self.hparams, {id(parameter) for parameter in self.reverse.process.parameters()}
        groups = [
            {
                "name": "forward",
                "lr": hp["lr"] if hp["process_lr"] is None else hp["process_lr"],
                "params": [p for p in self.parameters() if id(p) in process],
            },
            {"name": "reverse", "lr": hp["lr"], "params": [p for p in self.parameters() if id(p) not in process]},
        ]
        return [group for group in groups if group["params"]]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        hp = self.hparams
        # one kernel for all weights; Lightning refuses to clip gradients for it under mixed precision
        fused = None if isinstance(self.trainer.precision_plugin, MixedPrecision) else True
        optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=hp["lr"], betas=tuple(hp["betas"]), weight_decay=hp["weight_decay"], fused=fused
        )
        total = self.trainer.estimated_stepping_batches
        factor = partial(_lr_factor, warmup=hp["warmup_steps"], total=total, decay=hp["decay"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def _lr_factor(step: int, warmup: int, total: float, decay: str) -> float:
    done = min(step / total, 1.0)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[decay]
    return min(1.0, (step + 1) / max(warmup, 1)) * (0.01 + 0.99 * left)


def describe(value: Any) -> Any:
    """Returns a part as plain data: a class or a partial of one as ``{class_path, init_args}``, the rest as it is.

    Raises:
        ConfigError: the value cannot be written down, as a lambda cannot.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(describe(item) for item in value)
    if isinstance(value, partial) and value.args and isinstance(value.args[-1], type):
        # what jsonargparse makes of {class_path, init_args}: a partial of its instantiator, the class and the arguments
        return describe(partial(value.args[-1], **value.keywords))
    kind, given = (value.func, value.keywords) if isinstance(value, partial) and not value.args else (value, {})
    if "<" not in getattr(kind, "__qualname__", "<"):
        path = f"{kind.__module__}.{kind.__qualname__}"
        if not isinstance(kind, type):
            if given:
                raise ConfigError(f"{path} is a function: give it without settings, or a class with them")
            return path
        # defaults too: a checkpoint must not change its meaning when a later version changes one
        parameters = inspect.signature(kind).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        return {"class_path": path, "init_args": {k: describe(v) for k, v in {**defaults, **given}.items()}}
    raise ConfigError(
        f"{value!r} cannot be written into a checkpoint: give a part as a class defined at the top level of a module, or as "
        "functools.partial(Class, name=value)"
    )

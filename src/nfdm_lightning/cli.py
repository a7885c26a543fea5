"""The ``lightning`` command: fit, validate, test and predict by LightningCLI, sample and likelihood."""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf.errors import OmegaConfBaseException

from nfdm_lightning import cli_errors
from nfdm_lightning.callbacks import (
    EMA,
    NLL,
    HealthCheck,
    LastCheckpoint,
    PredictionWriter,
    StopBetweenSteps,
    TrainingRecord,
)
from nfdm_lightning.data import DataModule
from nfdm_lightning.errors import CheckpointError, ConfigError, DataError, NfdmError
from nfdm_lightning.evaluation import likelihood, likelihood_parser
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.report import build_report, report_path, write_report
from nfdm_lightning.sampling import sample, sample_parser

EXIT_FAILED, EXIT_USER_ERROR, EXIT_SIGINT, EXIT_SIGTERM = 1, 2, 130, 143
CHECKPOINTS = "checkpoints"
_COMMANDS: dict[str, tuple[Callable[..., cli_errors.Parser], Callable[..., Any]]] = {  # besides LightningCLI's
    "sample": (sample_parser, sample),
    "likelihood": (likelihood_parser, likelihood),
}

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` to the run's folder once training has really started, never over that of another run.

    A resumed run keeps the first file and writes its own configuration to ``config_resumed.yaml``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass  # too early: the run may still fail

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_dir = trainer.log_dir  # asked for by every rank: it is broadcast
        if trainer.is_global_zero and log_dir is not None:
            folder = Path(log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            name = "config_resumed.yaml" if trainer.ckpt_path else "config.yaml"
            self.parser.save(self.config, str(folder / name), skip_unset=False, overwrite=True, multifile=False)


class NfdmCLI(LightningCLI):
    """LightningCLI with the project's parts wired: data linked to the model, callbacks that are always there, one folder
    per run, and ``--ckpt_path`` that means what it says.

    Precedence of the model's settings: command line, ``--config``, the checkpoint of ``--ckpt_path``, defaults.
    """

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        super().__init__(
            NeuralDiffusion,
            DataModule,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            trainer_defaults={"default_root_dir": "runs/default"},
            parser_class=cli_errors.Parser,
            parser_kwargs={"parser_mode": "omegaconf+"},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        # in this order: a stop comes after the averaging and the counting of the step
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(NLL, "nll")
        parser.add_lightning_class_args(HealthCheck, "health")
        parser.add_lightning_class_args(TrainingRecord, "training_record")
        parser.add_lightning_class_args(StopBetweenSteps, "stop")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        for name in cli_errors.LINKED:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def _add_subcommands(self, parser: Any, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, (build, _) in _COMMANDS.items():
            subparser = build()
            parser._subcommands_action.add_subcommand(name, subparser, help=subparser.description)

    def parse_arguments(self, parser: Any, args: ArgsType) -> None:
        assert isinstance(args, list)
        self.config = parser.parse_args(args)
        subcommand = self.config.get("subcommand")
        if subcommand in (None, *_COMMANDS):
            return
        config = self.config[subcommand]
        files = [str(path) for path in config.get("config") or []]
        sources = [(path, yaml.safe_load(Path(path).read_text())) for path in files if os.path.isfile(path)]
        if config.ckpt_path is None:
            if subcommand != "fit":
                raise ConfigError(f"{subcommand} needs a checkpoint: give --ckpt_path=FILE, last or best")
        else:
            path = find_checkpoint(str(config.ckpt_path), Path(config.trainer.default_root_dir))
            model = checkpoint_hyper_parameters(path)
            # as the first configuration, so that every file and flag of the user's comes after it
            place = args.index(subcommand) + 1
            stored = json.dumps({"model": model})
            args = [*args[:place], "--config", stored, *args[place:], "--ckpt_path", str(path)]
            self.config = parser.parse_args(args)
            sources.insert(0, (str(path), {"model": model}))
        cli_errors.warn_of_kept_arguments(self.config[subcommand].as_dict(), sources)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: parse_arguments has read the checkpoint, without overriding what the user said."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer", default={})
        root = str(config["default_root_dir"])
        if config.get("logger") in (None, True):
            # one folder per run, no version_N: checkpoints are found again
            kwargs["logger"] = TensorBoardLogger(root, name="", version="", default_hp_metric=False)
        if config.get("strategy") == ModelParallelStrategy.__name__:  # alone, it would reach the trainer as a string
            kwargs["strategy"] = ModelParallelStrategy(save_distributed_checkpoint=False)
        given = config.get("callbacks") or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if config.get("enable_checkpointing") is not False:
            callbacks.append(
                ModelCheckpoint(
                    dirpath=f"{root}/{CHECKPOINTS}",
                    filename="best",
                    monitor="val/bits_per_dim",
                    enable_version_counter=False,
                )
            )
        if self.subcommand == "predict":
            callbacks.append(PredictionWriter())
        extra = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        for callback in extra:
            if isinstance(callback, LastCheckpoint):
                callback.dirpath = f"{root}/{CHECKPOINTS}"
        if config.get("enable_checkpointing") is False:
            extra = [callback for callback in extra if not isinstance(callback, LastCheckpoint)]
        try:
            return self._instantiate_trainer({**config, **kwargs, "callbacks": callbacks}, extra)
        except ValueError as error:  # settings of the trainer that do not go together
            raise ConfigError(str(error)) from error

    def before_fit(self) -> None:
        """Refuses to start a new run over the checkpoints of another."""
        folder = Path(self.trainer.default_root_dir) / CHECKPOINTS
        resumed = self.config[self.subcommand].ckpt_path
        if (
            self.trainer.is_global_zero
            and resumed is None
            and any(folder.glob("*.ckpt"))
            and not _is_fast_dev_run(self.trainer)
        ):
            raise ConfigError(
                f"{self.trainer.default_root_dir} already holds a run: continue it with --ckpt_path=last (or best), choose "
                "another folder with --trainer.default_root_dir=DIR, or remove it"
            )

    def after_fit(self) -> None:
        if self.trainer.is_global_zero and not _is_fast_dev_run(self.trainer):
            print(f"run folder: {self.trainer.default_root_dir}")

    def after_test(self) -> None:
        """Prints the result in one line and writes the report beside the checkpoint."""
        if not self.trainer.is_global_zero or "test/bits_per_dim" not in self.trainer.callback_metrics:
            return
        checkpoint = Path(self.config[self.subcommand].ckpt_path)
        config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        report = build_report(self.trainer, self.model, checkpoint, config.get(self.subcommand, config))
        path, metrics = report_path(checkpoint), report["metrics"]
        write_report(report, path)
        given = "" if self.model.num_classes is None else " given the labels"
        print(
            f"test bits/dim: {metrics['test/bits_per_dim']:.4f} +- {metrics['test/bits_per_dim_se']:.4f} "
            f"(bound{given}; standard error over data and draws), written to {path}"
        )


def _is_fast_dev_run(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))  # set dynamically


def find_checkpoint(name: str, root: Path) -> Path:
    """Returns the file that ``--ckpt_path`` means: a path, or ``last`` or ``best`` of the run in ``root``.

    Raises:
        CheckpointError: there is no such file.
    """
    path = root / CHECKPOINTS / f"{name}.ckpt" if name in ("last", "best") else Path(name)
    if path.is_file():
        return path
    folder = path.parent
    there = ", ".join(sorted(file.name for file in folder.glob("*.ckpt"))) if folder.is_dir() else ""
    raise CheckpointError(
        f"--ckpt_path={name}: there is no {path}; {f'{folder} holds {there}' if there else f'{folder} holds no checkpoints'}"
        + ("; the run's folder is set by --trainer.default_root_dir" if name in ("last", "best") else "")
    )


def checkpoint_hyper_parameters(path: Path) -> dict[str, Any]:
    """Returns the model's settings stored in a checkpoint, less those that come from the data.

    Raises:
        CheckpointError: the file is damaged, or not a checkpoint of this package.
    """
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds on a damaged file
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is not a readable checkpoint ({reason}); give another with --ckpt_path") from None
    if not isinstance(checkpoint, dict) or "hyper_parameters" not in checkpoint:
        raise CheckpointError(f"{path} is not a checkpoint of a NeuralDiffusion: it has no hyper-parameters")
    known = (*cli_errors.LINKED, "_instantiator")
    return {name: value for name, value in checkpoint["hyper_parameters"].items() if name not in known}


def _run(args: list[str]) -> None:
    if args and args[0] in _COMMANDS:
        build, function = _COMMANDS[args[0]]
        own = build(prog=f"lightning {args[0]}")
        function(**own.instantiate(own.parse_args(args[1:])).as_dict())
    else:
        NfdmCLI(args)


def main(args: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status.

    A user's error is one line and status 2, a failed run one line and status 1, a stop by signal 130 or 143. Set
    ``NFDM_TRACEBACK=1`` for tracebacks.
    """
    args = sys.argv[1:] if args is None else args
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own plug-ins, as with python -m
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")  # sharding; nothing is written into outputs
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    argv, sys.argv = sys.argv, [sys.argv[0], *args]  # what DDP starts its other processes with
    hint = "; continue with --ckpt_path=last" if args[:1] == ["fit"] else ""
    try:
        _run(args)
    except SIGTERMException:  # a SystemExit too
        return _say(f"stopped by SIGTERM{hint}", EXIT_SIGTERM)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            return _say(f"stopped by Ctrl+C{hint}", EXIT_SIGINT)
        return stop.code if isinstance(stop.code, int) else EXIT_FAILED if stop.code else 0
    except KeyboardInterrupt:
        return _say("stopped by Ctrl+C", EXIT_SIGINT)
    except (NfdmError, MisconfigurationException, OmegaConfBaseException, RuntimeError, ValueError) as raised:
        error = cli_errors.own_error(raised)
        if os.environ.get("NFDM_TRACEBACK") == "1":
            raise
        message = cli_errors.one_line(error)
        if message is None:
            raise
        return _say(f"error: {message}", EXIT_USER_ERROR if _is_users(error) else EXIT_FAILED)
    finally:
        sys.argv = argv
    return 0


def _is_users(error: BaseException) -> bool:
    users = (ConfigError, DataError, CheckpointError, MisconfigurationException, OmegaConfBaseException)
    return isinstance(error, users) or cli_errors.is_state_mismatch(error)


def _say(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status

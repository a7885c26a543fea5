"""``lightning likelihood``: several estimates of a checkpoint's likelihood in one table and one JSON file.

The samples are shared out over processes, and what has been evaluated is kept beside the checkpoint until the report is
written: a stopped evaluation goes on where it was, on any number of processes.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from nfdm_lightning.bound import bits_per_dim
from nfdm_lightning.checksums import tensors_md5
from nfdm_lightning.cli_errors import Parser
from nfdm_lightning.data import DataModule
from nfdm_lightning.errors import ConfigError, NonFiniteError
from nfdm_lightning.labels import Labelled
from nfdm_lightning.likelihood import ODE, TRUST, Bound, Estimator, ImportanceWeighted, Trust, check_trust, judge
from nfdm_lightning.marginals import Consistency, MarginalGap
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.provenance import commit, settings_of, versions
from nfdm_lightning.report import (
    checkpoint_record,
    count_parameters,
    density_name,
    read_checkpoint,
    training_summary,
    write_report,
)
from nfdm_lightning.sampling import load_model, stored_data

_DESCRIPTION = "Estimate the likelihood of data under a checkpoint."
_SAVE_EVERY = 30.0  # seconds
_PROBE_GAP = "probe_gap"


@dataclass(frozen=True)
class Measurement:
    """One estimator's result over a data set.

    Attributes:
        name: bound, iw or ode.
        of: the model whose likelihood it is, SDE or ODE.
        dequantisation: what connects data and latents.
        settings: of the estimator.
        values: of each sample, (N,): nats, and the parts by name.
        dimensions: D.
        nfe: evaluations of the predictor per sample.
        seconds: how long it took in this process, without what was there already.
        trust: for the ODE, the verdict of the guard.
    """

    name: str
    of: str
    dequantisation: str
    settings: dict[str, Any]
    values: dict[str, Tensor]
    dimensions: int
    nfe: float
    seconds: float
    trust: Trust | None = None

    def record(self) -> dict[str, Any]:
        """Returns the result as plain data; standard errors are over the data and the draws."""
        mean, error = _mean(self.values["nats"])
        bits, bits_error = bits_per_dim(torch.tensor([mean, error], dtype=torch.float64), self.dimensions).tolist()
        record: dict[str, Any] = {
            "estimator": self.name,
            "of": self.of,
            "bits_per_dim": bits,
            "bits_per_dim_se": bits_error,
            "nats": mean,
            "nats_se": error,
            "nfe": self.nfe,
            "dequantisation": self.dequantisation,
            "parts_nats": {
                name: _mean(values)[0] for name, values in self.values.items() if name not in ("nats", "nfe", _PROBE_GAP)
            },
            "settings": self.settings,
            "seconds": round(self.seconds, 3),
        }
        if self.trust is not None:
            record["trust"] = {
                "trusted": self.trust.trusted,
                "reasons": self.trust.reasons,
                "threshold_bits_per_dim": TRUST,
                **asdict(self.trust),
            }
        return record


def _mean(values: Tensor) -> tuple[float, float]:
    """Returns the mean and its standard error; of a single value, the error is not known."""
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(torch.nan)
    return float(values.mean()), float(error)


class _Shelf:
    """What has been evaluated, by sample, in files that any later run of the same evaluation reads."""

    def __init__(self, folder: Path, key: str, rank: int) -> None:
        self.folder, self.key, self.rank = folder, key, rank
        self.own: list[dict[str, Tensor]] = []
        self._saved = time.monotonic()

    def read(self) -> dict[str, Tensor]:
        """Returns all that is there, sorted by sample, each sample once; a damaged file counts as not there."""
        parts = list(self.own)
        for path in sorted(self.folder.glob(f"{self.key}.*.safetensors")):
            with contextlib.suppress(SafetensorError, OSError):
                parts.append(load_file(path))
        if not parts:
            return {}
        every = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        places, first = torch.unique(every["index"], return_inverse=True)
        chosen = torch.empty(len(places), dtype=torch.long).scatter_(0, first, torch.arange(len(first)))
        return {name: values[chosen] for name, values in every.items()}

    def add(self, results: dict[str, Tensor]) -> None:
        """Keeps the results of a batch, in memory at once and in the file now and then."""
        self.own.append({name: values.detach().cpu() for name, values in results.items()})
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Writes this process's results, whole or not at all."""
        self._saved = time.monotonic()
        if not self.own:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # with what an earlier run has left under this name
        merged = self.read() if self.path.is_file() else None
        tensors = merged or {name: torch.cat([part[name] for part in self.own]) for name in self.own[0]}
        unfinished = self.path.with_suffix(".partial")
        save_file({name: values.contiguous() for name, values in tensors.items()}, unfinished)
        unfinished.replace(self.path)

    @property
    def path(self) -> Path:
        """The file of this process."""
        return self.folder / f"{self.key}.{self.rank}.safetensors"


class _Data:
    """The samples of a split, fetched by place, with the labels of a conditional model."""

    def __init__(self, data: DataModule, split: Literal["val", "test"], number: int | None) -> None:
        self.data, self.raw = data, data.raw(split)
        self.labels = None if data.num_classes is None else data.model_labels(split)
        self.number = len(self.raw) if number is None else min(number, len(self.raw))

    def check(self, model: NeuralDiffusion) -> None:
        """Refuses data that the model is not for: of another shape, with labels or without, of other classes.

        Raises:
            ConfigError: says which.
        """
        x, label = self.fetch(torch.tensor([0]), model)
        model.unpack(x if label is None else Labelled(x, label))
        if self.data.num_classes != model.num_classes:
            raise ConfigError(f"the data have {self.data.num_classes} classes, but the model {model.num_classes}")

    def fetch(self, places: Tensor, model: NeuralDiffusion) -> tuple[Tensor, Tensor | None]:
        """Returns samples as the model takes them, and their labels if the model is conditional."""
        x = self.data.normalise(self.raw[places].to(model.device)).to(model.dtype)
        return x, None if self.labels is None else self.labels[places].to(model.device)


class _Batches:
    """Goes through places in batches that fit into memory: halved whenever they do not."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def over(self, places: Tensor, evaluate: Any) -> Iterator[tuple[Tensor, Any]]:
        """Yields each batch of places with what ``evaluate`` makes of it.

        Raises:
            ConfigError: not even one sample fits.
        """
        begin = 0
        while begin < len(places):
            batch = places[begin : begin + self.batch_size]
            try:
                result = evaluate(batch)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    raise ConfigError("the evaluation of a single sample does not fit into memory") from None
                result = None
            if result is None:  # outside of the handler, which keeps the tensors of the failed attempt alive
                self.batch_size = max(1, min(len(batch), self.batch_size) // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            yield batch, result
            begin += len(batch)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def likelihood(
    ckpt_path: str,
    bound: Bound,
    iw: ImportanceWeighted,
    ode: ODE,
    consistency: Consistency,
    estimators: str = "bound,ode",
    data: DataModule | None = None,
    split: Literal["val", "test"] = "test",
    number: int | None = None,
    batch_size: int = 256,
    guard: int = 64,
    seed: int = 0,
    out: str | None = None,
    accelerator: str = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Estimates the likelihood of data under a checkpoint, with its averaged weights.

    Prints a table and writes a JSON file beside the checkpoint: ``last.likelihood_test.json`` for ``last.ckpt``.

    Args:
        ckpt_path: checkpoint file.
        bound: settings of the variational bound.
        iw: settings of the importance-weighted bound.
        ode: settings of the ODE likelihood.
        consistency: settings of the comparison of the SDE's marginals with the ODE's.
        estimators: which of bound (variational), iw (importance-weighted) and ode (change of variables), between commas.
        data: the data; by default those of the run's config.yaml.
        split: val or test.
        number: how many samples, the first of the split; all by default.
        batch_size: samples at a time, halved as often as memory requires.
        guard: samples on which the ODE likelihood is compared with a finer solve and other probes; 0 leaves it out.
        seed: of all random numbers.
        out: the JSON file.
        accelerator: cpu, cuda, ... or auto.
        devices: how many processes on each machine, one for each device.
        num_nodes: how many machines.
        progress: whether to show a progress bar.

    Returns:
        The report.
    """
    checkpoint, known = Path(ckpt_path), {"bound": bound, "iw": iw, "ode": ode}
    names = [name.strip() for name in estimators.split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(f"--estimators={estimators}: no estimator {name!r}; choose from {', '.join(known)}")
    if seed < 0:
        raise ConfigError(f"seed={seed} must not be negative")
    if batch_size < 1 or guard < 0 or (number is not None and number < 1):
        raise ConfigError(f"batch_size={batch_size} and number={number} must be at least 1, guard={guard} at least 0")
    model = load_model(checkpoint)
    if bound.discrete_steps is None:
        known["bound"] = Bound(bound.draws, model.discrete_steps)
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes)
    fabric.launch()
    model = model.to(fabric.device)
    data = stored_data(checkpoint, "data") if data is None else data
    with fabric.rank_zero_first():
        samples = _Data(data, split, number)
    samples.check(model)
    path = checkpoint.with_suffix(f".likelihood_{split}.json") if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    run = _Run(fabric, model, samples, batch_size, seed, checkpoint, split, progress)
    found = [run.measure(name, known[name]) for name in dict.fromkeys(names)]
    if guard:
        found = [run.guarded(one, ode, guard) if one.name == "ode" else one for one in found]
    gaps = run.consistency(consistency)
    stored = read_checkpoint(checkpoint)
    training = training_summary(stored)
    report = {
        "likelihood": density_name(model),
        "estimates": [one.record() for one in found],
        "marginals": {
            "settings": settings_of(consistency),
            "gaps": [{"t": gap.t, "distance": gap.test.distance, "p_value": gap.test.p_value} for gap in gaps],
        },
        "data": data.record(),
        "split": split,
        "samples": samples.number,
        "seed": seed,
        "precision": str(model.dtype).removeprefix("torch."),
        "model": dict(model.hparams),
        "world_size": fabric.world_size,
        "checkpoint": {**checkpoint_record(checkpoint, stored), "md5_of_weights": run.weights},
        "training": training,
        "parameters": count_parameters(model),
        "code": {"commit": commit(), **versions()},
    }
    if fabric.is_global_zero:
        write_report(report, path)
        run.forget()
        print(table(found, gaps))
        flip = (training.get("data") or {}).get("flip", "unknown")
        print(f"{samples.number} samples of the {split} split, model trained with flip={flip}, written to {path}")
    fabric.barrier()
    return report


class _Run:
    """One evaluation: where it runs, of what, and what is kept of it."""

    def __init__(
        self,
        fabric: Fabric,
        model: NeuralDiffusion,
        samples: _Data,
        batch_size: int,
        seed: int,
        checkpoint: Path,
        split: str,
        progress: bool,
    ) -> None:
        self.fabric, self.model, self.samples, self.seed = fabric, model, samples, seed
        self.batches, self.checkpoint, self.split, self.progress = _Batches(batch_size), checkpoint, split, progress
        self.folder = checkpoint.with_suffix(f".likelihood_{split}.partial")
        self.weights = tensors_md5(model.state_dict())
        self.keys: list[str] = []

    def _shelf(self, name: str, settings: dict[str, Any]) -> _Shelf:
        data, labels = self.samples.data, self.samples.labels
        about: list[object] = [name, sorted(settings.items()), self.weights, dict(self.model.hparams), commit()]
        about += [str(self.model.dtype), data.checksum, self.split, self.seed]
        key = f"{name}-{tensors_md5({} if labels is None else {'labels': labels}, repr(about))[:16]}"
        self.keys.append(key)
        return _Shelf(self.folder, key, self.fabric.global_rank)

    def _evaluate(self, shelf: _Shelf, number: int, evaluate: Any, title: str) -> dict[str, Tensor]:
        """Returns the results of the first ``number`` samples, those of all processes, in order."""
        done = shelf.read().get("index", torch.empty(0, dtype=torch.long))
        missing = torch.arange(number)
        missing = missing[~torch.isin(missing, done)]
        self.fabric.barrier()  # all have read before any writes
        own = missing[self.fabric.global_rank :: self.fabric.world_size]
        with tqdm(
            total=len(own), desc=title, unit="sample", disable=not (self.progress and self.fabric.is_global_zero)
        ) as bar:
            for places, results in self.batches.over(own, evaluate):
                shelf.add({"index": places, **results})
                bar.update(len(places))
        shelf.save()
        self.fabric.barrier()
        results = shelf.read()
        keep = results.get("index", torch.empty(0, dtype=torch.long)) < number
        if int(keep.sum()) != number:
            raise ConfigError(
                f"{self.folder} is not shared by all processes: give every machine the same file system for checkpoints"
            )
        self.fabric.barrier()
        return {name: values[keep] for name, values in results.items()}

    def measure(self, name: str, estimator: Estimator) -> Measurement:
        """Returns the result of an estimator over the data."""
        model, settings = self.model, settings_of(estimator)

        def evaluate(places: Tensor) -> dict[str, Tensor]:
            x, label = self.samples.fetch(places, model)
            result = estimator.evaluate(model.reverse, model.decoder, x, places, self.seed, label)
            values = {"nats": result.nats, "nfe": torch.full_like(result.nats, result.nfe), **result.parts}
            gap = result.probe_gap(model.dimensions)
            values |= {_PROBE_GAP: gap} if len(gap) else {}
            return {key: value.double() for key, value in values.items()}

        begin = time.perf_counter()
        values = self._evaluate(self._shelf(name, settings), self.samples.number, evaluate, name)
        return Measurement(
            name=name,
            of=estimator.of,
            dequantisation=estimator.dequantisation_name(model.decoder),
            settings=settings,
            values={key: value for key, value in values.items() if key != "index"},
            dimensions=model.dimensions,
            nfe=float(values["nfe"].mean()),
            seconds=time.perf_counter() - begin,
        )

    def guarded(self, one: Measurement, ode: ODE, number: int) -> Measurement:
        """Returns an ODE likelihood with the verdict of the guard."""
        model, number = self.model, min(number, self.samples.number)

        def evaluate(places: Tensor) -> dict[str, Tensor]:
            x, label = self.samples.fetch(places, model)
            try:
                solver, probe = check_trust(ode, model.reverse, model.decoder, x, places, self.seed, label)
            except NonFiniteError:  # the result itself is there
                unknown = torch.full((len(places),), torch.nan, dtype=torch.float64)
                return {"solver": unknown} if ode.exact_trace(model.dimensions) else {"solver": unknown, "probe": unknown}
            return {"solver": solver.double()} | ({"probe": probe.double()} if len(probe) else {})

        results = self._evaluate(self._shelf("guard", one.settings), number, evaluate, "guard")
        probe = one.values.get(_PROBE_GAP, results.get("probe", torch.empty(0)))  # of all samples, where it was had for free
        return replace(one, trust=judge(results["solver"], probe))

    def consistency(self, settings: Consistency) -> list[MarginalGap]:
        """Returns how far SDE and ODE are apart, on the first process; nothing on the others."""
        if not settings.samples or not self.fabric.is_global_zero:
            return []
        reverse, like, source = self.model.reverse, next(self.model.parameters()), None
        if reverse.process.takes_source:
            source = self.samples.data.sources(settings.samples).to(like)
        label = self.model.labels_in_turn(settings.samples)
        given = reverse.given(source, None if label is None else label.to(like.device))
        return settings.evaluate(given, self.seed)

    def forget(self) -> None:
        """Removes what was kept of this evaluation, and nothing of others."""
        for key in self.keys:
            for path in self.folder.glob(f"{key}.*"):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are in it, or it never was
            self.folder.rmdir()


def table(found: list[Measurement], gaps: list[MarginalGap]) -> str:
    """Returns the results as text, a line each."""
    rows = [("estimate", "of", "bits/dim", "nats", "NFE", "dequantisation")]
    notes = []
    for one in found:
        record = one.record()
        rows.append(
            (
                one.name,
                one.of,
                _with_error(record["bits_per_dim"], record["bits_per_dim_se"], 4),
                _with_error(record["nats"], record["nats_se"], 3),
                f"{one.nfe:.0f}",
                one.dequantisation,
            )
        )
        if one.trust is not None and not one.trust.trusted:
            notes.append(f"UNTRUSTED {one.name}: {'; '.join(one.trust.reasons)}")
        elif one.trust is not None:
            notes.append(f"{one.name}: a finer solve differs by {one.trust.solver_gap:+.4f} bits/dim: trusted")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if gaps:
        each = ", ".join(f"t={gap.t:g}: {gap.test.distance:.4f} (p={gap.test.p_value:.3f})" for gap in gaps)
        notes.append(f"marginals of SDE and ODE, energy distance from 0 (equal) to 1: {each}")
    return "\n".join([*lines, *notes])


def _with_error(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" +- {error:.{digits}f}")


def likelihood_parser(**kwargs: Any) -> Parser:
    """Returns the parser of the subcommand."""
    parser = Parser(description=_DESCRIPTION, **kwargs)
    parser.add_class_arguments(Bound, "bound")
    parser.add_class_arguments(ImportanceWeighted, "iw")
    parser.add_class_arguments(ODE, "ode")
    parser.add_class_arguments(Consistency, "consistency")
    parser.add_function_arguments(likelihood, skip={"bound", "iw", "ode", "consistency"}, fail_untyped=True)
    return parser

"""The trainer: one loop, one step, and a state that is saved and resumed whole."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsemoe.data import BatchSampler, Corpus
from sparsemoe.train import checkpoint
from sparsemoe.train.config import ConfigError, RunConfig, from_dict, to_dict
from sparsemoe.train.device import autocast, choose_device, choose_precision
from sparsemoe.train.progress import Progress
from sparsemoe.train.schedule import TimeBudget, learning_rate_factor
from sparsemoe.train.task import Task, task_of

METRICS = "metrics.jsonl"


class TrainError(RuntimeError):
    """Training cannot go on; the message is one sentence for the user."""


class Trainer:
    """Trains a model on bytes as a RunConfig says: a language model, or a codec.

    config       the run; its seed decides the model's first weights and the order of the data
    train        the corpus to train on
    held_out     the corpus to validate on
    out          the run's folder, for metrics.jsonl and checkpoints; None writes nothing
    progress     told of every record; see sparsemoe.train.progress
    checkpoints  folder for checkpoints, in ``out`` unless absolute; None writes none

    ``records`` holds one dict a logging interval, as metrics.jsonl does.
    """

    def __init__(
        self,
        config: RunConfig,
        train: Corpus,
        held_out: Corpus,
        out: str | Path | None = None,
        progress: Progress | None = None,
        checkpoints: str | Path | None = "checkpoints",
    ) -> None:
        settings = config.train
        self.config, self.held_out = config, held_out
        self.out = None if out is None else Path(out)
        self.checkpoints = self.out / checkpoints if self.out and checkpoints else None
        self.progress = progress or Progress()
        self.device = choose_device(settings.device)
        self.precision = choose_precision(settings.precision, self.device)
        torch.manual_seed(settings.seed)
        self.task = task_of(config)
        self.model = self.task.make_model().to(self.device)
        self.forward = self.task.compiled(self.model) if settings.compile else self.model
        self.optimizer = make_optimizer(self.model, config, self.device)
        self.sampler = BatchSampler(
            train, config.model.context, settings.batch_size, seed=settings.seed
        )
        self.step = 0
        self.total_steps: int | None = None if settings.minutes else settings.steps
        self.seconds = 0.0  # of training, over all sessions of the run
        self.stop = False  # set by another hand: fit() ends after the step, and saves
        self.records: list[dict[str, Any]] = []
        self._interval = Interval()
        self._saved_step: int | None = None

    @property
    def bytes_per_step(self) -> int:
        settings = self.config.train
        return settings.batch_size * settings.accumulation * self.config.model.context

    def fit(self, deadline: float | None = None) -> None:
        """Trains to the last step, or to ``deadline`` (of time.monotonic) if that is given
        or ``train.minutes`` set. Raises TrainError where the loss is no longer finite."""
        settings = self.config.train
        if self.checkpoints and self._saved_step is None and checkpoint.newest(self.checkpoints):
            raise TrainError(f"{self.out} holds checkpoints of another run; resume it or move it")
        self._start_metrics()
        if deadline is None and settings.minutes:
            deadline = time.monotonic() + settings.minutes * 60 - self.seconds
        budget = None if deadline is None else TimeBudget(deadline)
        if deadline is not None and self.step and time.monotonic() >= deadline:
            self.total_steps = self.step  # a resumed run that has had its time
        self.model.train()
        started = time.monotonic() - self.seconds
        self._interval = Interval()
        while self.total_steps is None or self.step < self.total_steps:
            self.train_step()
            if budget:  # until it knows, a resumed run keeps its former estimate
                self.total_steps = budget.total_steps(self.step) or self.total_steps
            at_end = self.step == self.total_steps or self.stop
            self.seconds = time.monotonic() - started
            if self.step % settings.log_every == 0 or at_end:
                self._log()
            if at_end:
                break
            if settings.validate_every and self.step % settings.validate_every == 0:
                self.validate()
            if settings.save_every and self.step % settings.save_every == 0:
                self.save()
        self.seconds = time.monotonic() - started
        if settings.validate_every:
            self.validate()
        self.save()

    def train_step(self) -> None:
        """One step of the optimizer; the device is not waited for."""
        settings = self.config.train
        batches = []
        for _ in range(settings.accumulation):
            with autocast(self.device, self.precision):
                loss, aux = self.task.loss(self.forward, self.sampler, self.device, self.step)
            (loss / settings.accumulation).backward()
            self._interval.add(aux, self.bytes_per_step // settings.accumulation)
            batches.append(aux)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self._interval.gradient_norm = norm
        factor = learning_rate_factor(
            self.step, self.total_steps, settings.warmup_steps, settings.final_learning_rate
        )
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step(self.model, batches)
        self.step += 1

    def _log(self) -> None:
        """Reads the interval's sums from the device and records them."""
        record = {
            "step": self.step,
            "total_steps": self.total_steps,
            "bytes": self.step * self.bytes_per_step,
            "seconds": self.seconds,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **self._interval.read(self.task),
            "bytes_per_second": self._interval.bytes / self._interval.seconds(),
        }
        if not math.isfinite(record["bits_per_byte"]):
            raise TrainError(
                f"the loss is {record['bits_per_byte']} at step {self.step}; "
                "a lower train.learning_rate may help"
            )
        self._interval = Interval()
        self._record(record)

    def validate(self) -> float:
        """Bits per byte on a sample of the held-out corpus, recorded with the task's other figures;
        NaN where there is nothing to measure yet."""
        self._interval.pause()
        figures = self.task.validate(self.model, self.held_out, self.precision)
        self._interval.resume()
        if figures:
            self._record({"step": self.step, "seconds": self.seconds, **figures})
        return figures.get("validation_bits_per_byte", math.nan)

    def _start_metrics(self) -> None:
        """Writes the records so far, and none that a resumed run had after its checkpoint."""
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(record) + "\n" for record in self.records)
            (self.out / METRICS).write_text(lines, encoding="utf-8")

    def _record(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.out:
            with (self.out / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self.progress.update(record)

    def save(self) -> None:
        """Writes a checkpoint, where the run has a folder for them."""
        if self.checkpoints is None or self._saved_step == self.step:
            return
        self._interval.pause()
        names = [name for group in self.optimizer.param_groups for name in group["param_names"]]
        training = {"random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            training["random.cuda"] = torch.cuda.get_rng_state(self.device)
        for index, state in self.optimizer.state_dict()["state"].items():
            training |= {f"optimizer.{names[index]}.{key}": t for key, t in state.items()}
        info = {
            "kind": self.task.kind,
            "config": to_dict(self.config),
            "precision": self.precision,
            "total_steps": self.total_steps,
            "seconds": self.seconds,
            "data": {"sampler": self.sampler.state_dict(), "files": self._data_fingerprint()},
            "records": self.records,
        }
        checkpoint.save(
            self.checkpoints,
            self.step,
            {"model": self.model.state_dict(), "training": training},
            info,
            keep=self.config.train.keep,
        )
        self._saved_step = self.step
        self._interval.resume()

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Takes up the state of a checkpoint: what follows is what would have followed.

        Raises CheckpointError where a file is damaged, ConfigError where the model's shape or
        the data's files are not those of the checkpoint.
        """
        check_kind(saved, type(self.config))
        model = self.config.model
        defaults = to_dict(type(model)())  # of keys that came after the checkpoint
        check_same_model(to_dict(model), defaults | saved.info["config"]["model"])
        if saved.info["data"]["files"] != self._data_fingerprint():
            raise ConfigError(
                f"the data's files are not those that {saved.path} was trained on; "
                "start a new run, or give the same --data"
            )
        self.model.load_state_dict(saved.tensors("model"))
        training = saved.tensors("training")
        state = self.optimizer.state_dict()
        names = [name for group in self.optimizer.param_groups for name in group["param_names"]]
        state["state"] = {index: {} for index in range(len(names))}
        for index, name in enumerate(names):
            prefix = f"optimizer.{name}."
            for key in [k for k in training if k.startswith(prefix)]:
                state["state"][index][key.removeprefix(prefix)] = training[key]
        self.optimizer.load_state_dict(state)
        torch.set_rng_state(training["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in training:
            torch.cuda.set_rng_state(training["random.cuda"], self.device)
        self.sampler.load_state_dict(saved.info["data"]["sampler"])
        if self.config.train.precision == "auto":
            self.precision = saved.info["precision"]
        self.step = self._saved_step = saved.step
        self.seconds = saved.info["seconds"]
        if self.total_steps is None and (saved.info["total_steps"] or 0) > saved.step:
            self.total_steps = saved.info["total_steps"]
        self.records = list(saved.info["records"])

    def _data_fingerprint(self) -> list[str]:
        return [self.sampler.corpus.fingerprint(), self.held_out.fingerprint()]


class Interval:
    """Sums of a logging interval, kept on the device until they are read; and its time."""

    def __init__(self) -> None:
        self.batches = self.bytes = 0
        self.started = self.paused = time.monotonic()
        self.sums: dict[str, Tensor] = {}
        self.gradient_norm: Tensor | None = None

    def pause(self) -> None:
        """What comes until resume() does not count as training time."""
        self.paused = time.monotonic()

    def resume(self) -> None:
        self.started += time.monotonic() - self.paused

    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def add(self, aux: dict[str, Tensor], num_bytes: int) -> None:
        self.batches += 1
        self.bytes += num_bytes
        for name, value in aux.items():
            value = value.detach().double() if value.is_floating_point() else value.long()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def read(self, task: Task) -> dict[str, Any]:
        """Means of the interval, as plain numbers."""
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return {
            "bits_per_byte": sums["cross_entropy"].item() / self.batches / math.log(2),
            "gradient_norm": self.gradient_norm.item(),
            **task.figures(sums, self.batches),
        }


def make_optimizer(model: nn.Module, config: RunConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and none on gains and biases."""
    settings = config.train
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(n, p) for n, p in named if p.dim() >= 2]},
        {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def check_same_model(model: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raises ConfigError naming the first key in which two model configs differ."""
    for key in model.keys() | saved.keys():
        if model.get(key) != saved.get(key):
            raise ConfigError(
                f"model.{key} is {model.get(key)}, but the checkpoint has {saved.get(key)}"
            )


def check_kind(saved: checkpoint.Checkpoint, config_type: type[RunConfig]) -> None:
    """Raises CheckpointError where a checkpoint is of another kind of model."""
    wanted = task_of(config_type()).kind
    found = saved.info.get("kind", wanted)
    if found != wanted:
        raise checkpoint.CheckpointError(f"{saved.path} is of a {found}, not of a {wanted}")


def load_model(
    path: str | Path, device: torch.device | str = "cpu", config_type: type[RunConfig] = RunConfig
) -> tuple[nn.Module, RunConfig]:
    """The model and config of a checkpoint, or of the newest checkpoint of a run.

    config_type  of the run: RunConfig, or CodecRunConfig for a codec

    Raises CheckpointError.
    """
    saved = checkpoint.find(path)
    check_kind(saved, config_type)
    config = from_dict(config_type, saved.info["config"])
    model = task_of(config).make_model()
    model.load_state_dict(saved.tensors("model"))
    return model.to(device).eval(), config


__all__ = ["TrainError", "Trainer", "load_model"]

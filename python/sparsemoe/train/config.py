"""A run's config: dataclasses that a YAML file fills one to one.

Every key of the file is a field, every field may be left out. Unknown keys and wrong types
are errors that say where and what. A dotted override (``model.hidden_size=256``) sets one
field and reads its value as YAML.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparsemoe.data import Corpus, load_corpora, load_standard_library
from sparsemoe.models.moe_lm import MoELMConfig
from sparsemoe.models.vyra import CodecConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class ConfigError(ValueError):
    """A config that cannot be used; the message is one sentence for the user."""


@dataclass
class DataConfig:
    paths: list[str] = field(default_factory=list)  # empty: the source of Python's own library
    suffixes: list[str] = field(default_factory=list)  # such as .py; empty: every file in a folder
    exclude: list[str] = field(default_factory=list)  # names of folders to pass over
    held_out: float = 0.03  # share of the files kept for evaluation
    library_tests: bool = False  # with paths empty: train on the library's tests too

    def __post_init__(self) -> None:
        _require(0 < self.held_out < 1, "held_out", self.held_out, "between 0 and 1")


@dataclass
class TrainConfig:
    steps: int = 1000  # ignored where minutes is set
    minutes: float | None = None  # train for this long; the schedule follows the clock
    batch_size: int = 16  # sequences a micro-batch, each of model.context bytes
    accumulation: int = 1  # micro-batches a step
    learning_rate: float = 3e-3
    final_learning_rate: float = 0.05  # at the end, as a share of learning_rate
    warmup_steps: int = 50
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1  # on matrices, not on gains
    clip_norm: float = 1.0
    precision: str = "auto"  # float32, bfloat16, or auto: bfloat16 on a GPU
    compile: bool = False  # torch.compile the model
    device: str = "auto"  # auto: a GPU where there is one
    seed: int = 0
    log_every: int = 20  # steps between two looks at the loss
    validate_every: int = 200  # steps between two validations; 0: never
    validation_bytes: int = 65536
    save_every: int = 500  # steps between two checkpoints; 0: only the last step's
    keep: int = 1  # newest checkpoints to keep

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "keep"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("warmup_steps", "validate_every", "save_every", "weight_decay", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("learning_rate", "clip_norm"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _require(self.minutes is None or self.minutes > 0, "minutes", self.minutes, "above 0")
        known = self.precision in ("auto", "float32", "bfloat16")
        _require(known, "precision", repr(self.precision), "auto, float32 or bfloat16")


@dataclass
class RunConfig:
    """Everything that decides a run of a language model."""

    model: MoELMConfig = field(default_factory=MoELMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class CodecRunConfig(RunConfig):
    """Everything that decides a run of Vyra's codec."""

    model: CodecConfig = field(default_factory=CodecConfig)  # type: ignore[assignment]


def load_config(
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    config_type: type[RunConfig] = RunConfig,
) -> RunConfig:
    """The config in a YAML file (or the defaults), with ``key.key=value`` overrides.

    ``file`` may also be the bare name of a config that comes with the package, such as
    ``demo``. Raises ConfigError.
    """
    values: dict[str, Any] = {}
    if file is not None:
        path = Path(file)
        if not path.exists() and (CONFIGS / f"{file}.yaml").exists():
            path = CONFIGS / f"{file}.yaml"
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            names = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
            raise ConfigError(
                f"cannot read config {file}: {error.strerror} (configs that come along: {names})"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return from_dict(config_type, apply_overrides(values, overrides))


def load_data(config: DataConfig) -> tuple[Corpus, Corpus]:
    """The training and the held-out corpus that a config names. Raises DataError."""
    if not config.paths:
        return load_standard_library(config.held_out, config.library_tests)
    return load_corpora(config.paths, config.held_out, config.suffixes, config.exclude)


def apply_overrides(values: Any, overrides: Iterable[str]) -> Any:
    """A copy of nested dicts with each ``key.key=value`` set."""
    if not isinstance(values, dict):
        return values  # from_dict says what is wrong with it
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} must have the form section.key=value")
        *sections, name = key.split(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override {override!r} has a value that is not YAML") from None
        at = values
        for section in sections:
            if at.get(section) is None:
                at[section] = {}
            at = at[section]
            if not isinstance(at, dict):
                raise ConfigError(f"override {override!r}: {section} is not a section")
        at[name] = value
    return values


def to_dict(config: Any) -> dict[str, Any]:
    """The nested dict that :func:`from_dict` turns back into the same config."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: Any, where: str = "") -> Any:
    """An instance of a dataclass from nested dicts; ``where`` is its dotted place."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'the config'} is {values!r}; it must be a section of keys")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    arguments = {}
    for key, value in values.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in names:
            near = _nearest(str(key), kind)
            raise ConfigError(f"unknown key {place}; the nearest known key is {_join(where, near)}")
        if dataclasses.is_dataclass(hints[key]):
            arguments[key] = from_dict(hints[key], value, place)
        else:
            arguments[key] = _typed(value, hints[key], place)
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ConfigError(f"{where}.{error}" if where else str(error)) from None


def _nearest(key: str, kind: type) -> str:
    """The known key most like ``key``, also looking one section down."""
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    for name in list(known):
        if dataclasses.is_dataclass(hints[name]):
            known += [f"{name}.{f.name}" for f in dataclasses.fields(hints[name])]

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, key, name.split(".")[-1]).ratio()

    return max(known, key=likeness)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _typed(value: Any, hint: Any, place: str) -> Any:
    """The value if it has the field's type; whole numbers may stand for floats."""
    if isinstance(hint, types.UnionType):  # X | None
        if value is None:
            return None
        (hint,) = (h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        if isinstance(value, list):
            return [_typed(v, item, f"{place}[{i}]") for i, v in enumerate(value)]
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint is float and isinstance(value, str):  # YAML reads 3e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    elif type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
    raise ConfigError(f"{place} is {value!r}; it must be of type {name}")


def _require(condition: bool, name: str, value: object, must_be: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}; it must be {must_be}")

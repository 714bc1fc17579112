import dataclasses
from pathlib import Path

import pytest
import yaml

from sparsemoe.train.config import (
    CONFIGS,
    CodecRunConfig,
    ConfigError,
    RunConfig,
    from_dict,
    load_config,
    to_dict,
)


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


def test_yaml_and_dataclass_map_one_to_one(tmp_path):
    config = RunConfig()
    config.model.dense_layers = [1, 2]
    config.model.capacity_factor = 1.25
    config.data.paths = ["a", "b c"]
    config.train.minutes = 2.5
    file = write(tmp_path, yaml.safe_dump(to_dict(config)))
    assert load_config(file) == config
    assert load_config(write(tmp_path, "")) == RunConfig() == load_config()


def test_overrides(tmp_path):
    file = write(tmp_path, "model: {hidden_size: 64}\ntrain:\n")
    config = load_config(
        file,
        [
            "model.hidden_size=256",
            "model.dense_layers=[0, 3]",
            "train.learning_rate=3e-3",
            "train.minutes=2",
            "train.device=cuda:1",
            "data.paths=[x=y]",
        ],
    )
    assert config.model.hidden_size == 256
    assert config.model.dense_layers == [0, 3]
    assert config.train.learning_rate == 0.003
    assert config.train.minutes == 2.0 and isinstance(config.train.minutes, float)
    assert config.train.device == "cuda:1"
    assert config.data.paths == ["x=y"]
    assert load_config(file, ["model.capacity_factor=null"]).model.capacity_factor is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hiden_size=8", "unknown key model.hiden_size; .* is model.hidden_size"),
        ("modle.hidden_size=8", "unknown key modle; the nearest known key is model"),
        ("hidden_size=8", "unknown key hidden_size; .* is model.hidden_size"),
        ("train.lr=1", "unknown key train.lr; the nearest known key is train"),
        ("model.hidden_size=big", "model.hidden_size is 'big'; it must be of type int"),
        ("model.hidden_size=8.0", "model.hidden_size is 8.0; it must be of type int"),
        ("model.hidden_size=true", "model.hidden_size is True; it must be of type int"),
        ("model.hidden_size=null", "model.hidden_size is None; it must be of type int"),
        ("train.learning_rate=fast", "train.learning_rate is 'fast'; it must be of type float"),
        ("train.compile=1", "train.compile is 1; it must be of type bool"),
        ("train.minutes=[1]", r"train.minutes is \[1\]; it must be of type float"),
        ("data.paths=a", "data.paths is 'a'; it must be of type list"),
        ("data.paths=[1]", r"data.paths\[0\] is 1; it must be of type str"),
        ("model=3", "model is 3; it must be a section"),
        ("model.hidden_size.x=3", "hidden_size is not a section"),
        ("model.hidden_size", "must have the form section.key=value"),
        ("model.hidden_size=[", "has a value that is not YAML"),
        ("model.top_k=9", "model.top_k is 9; it must be at most num_experts"),
        ("train.beta2=1.0", "train.beta2 is 1.0; it must be in"),
        ("train.batch_size=0", "train.batch_size is 0; it must be at least 1"),
        ("train.precision=fp8", "train.precision is 'fp8'; it must be auto, float32 or bfloat16"),
        ("data.held_out=1.0", "data.held_out is 1.0; it must be between 0 and 1"),
    ],
)
def test_bad_values_are_one_sentence(tmp_path, override, message):
    file = write(tmp_path, "model: {hidden_size: 64}")
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "config.yaml is not YAML"),
        ("- model", "the config is .* it must be a section of keys"),
        ("model: 3", "model is 3"),
        ("model:\n  heads: 3", "unknown key model.heads; .* model.num_heads"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_those_that_come_along():
    with pytest.raises(ConfigError, match=r"cannot read config nowhere.yaml: .*demo, demo_gpu"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda f: f.stem)
def test_configs_that_come_along_load(file):
    kind = CodecRunConfig if file.stem.startswith("codec") else RunConfig
    config = load_config(file.stem, config_type=kind)
    assert from_dict(kind, to_dict(config)) == config
    assert config == load_config(file, config_type=kind)


@pytest.mark.parametrize("kind", [RunConfig, CodecRunConfig])
def test_every_field_has_a_default_and_a_known_type(kind):
    config = kind()
    for section in dataclasses.fields(config):
        values = to_dict(getattr(config, section.name))
        assert from_dict(section.default_factory, values) == getattr(config, section.name)

"""The trainer with a codec."""

import json

import pytest
import torch

from sparsemoe.data import load_corpora
from sparsemoe.train import checkpoint
from sparsemoe.train.checkpoint import CheckpointError
from sparsemoe.train.config import CodecRunConfig, ConfigError, RunConfig, load_config
from sparsemoe.train.progress import Progress
from sparsemoe.train.trainer import Trainer, load_model
from tests.tiny_codec import tiny_codec_run
from tests.tiny_lm import tiny_run, write_files


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return load_corpora([write_files(tmp_path_factory.mktemp("data"))], held_out=0.2)


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in trainer.model.state_dict().items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_learns(corpora, tmp_path):
    config = tiny_codec_run(
        {"unquantized_accuracy": 0.7},
        steps=160,
        batch_size=8,
        learning_rate=1e-2,
        log_every=20,
        validate_every=20,
        validation_bytes=2048,
    )
    trainer = Trainer(config, *corpora, tmp_path)
    trainer.fit()
    training = [r for r in trainer.records if "byte_accuracy" in r]
    held_out = [r for r in trainer.records if "validation_byte_accuracy" in r]
    assert training[0]["byte_accuracy"] < 0.3 and training[-1]["byte_accuracy"] > 0.85
    assert held_out[-1]["validation_byte_accuracy"] > 0.8
    quantizing = [r["step"] for r in training if "perplexity" in r]
    assert 20 < quantizing[0] < 100 and quantizing[-1] == 160  # not before it had learnt something
    assert [r["step"] for r in held_out] == [s for s in quantizing if s >= held_out[0]["step"]]
    record = trainer.records[-2]
    assert len(record["perplexity"]) == len(record["code_usage"]) == 2
    assert all(1 <= p <= 32 for p in record["perplexity"])
    assert 0 < record["code_bits"] <= 2 * 5 / 8
    model, loaded = load_model(tmp_path, config_type=CodecRunConfig)
    assert loaded == config
    assert_same_bits(dict(model.state_dict()), state(trainer))
    assert bool(model.quantizer.initialized)


RESUMED = {
    "after k-means": {},
    "before k-means": {"unquantized_steps": 7},
    "not yet": {"unquantized_accuracy": 0.99},
    "random numbers": {"quantizer_dropout": 0.5, "dropout": 0.1, "dead_code_share": 0.9},
}


@pytest.mark.parametrize("model", RESUMED.values(), ids=RESUMED)
def test_resumes_bit_for_bit(corpora, tmp_path, model):
    config = tiny_codec_run(model, steps=10, save_every=5, keep=3, accumulation=2)
    whole = Trainer(config, *corpora, tmp_path / "whole")
    whole.fit()

    torch.manual_seed(1234)  # what came before must not matter
    torch.rand(7)
    resumed = Trainer(config, *corpora, tmp_path / "resumed")
    resumed.resume(checkpoint.find(tmp_path / "whole/checkpoints/step-00000005"))
    resumed.fit()
    assert_same_bits(state(resumed), state(whole))
    saved = [checkpoint.newest(tmp_path / f"{name}/checkpoints") for name in ("whole", "resumed")]
    assert_same_bits(saved[0].tensors("training"), saved[1].tensors("training"))
    assert saved[0].info["data"] == saved[1].info["data"]


def test_the_first_codebooks_are_of_enough_vectors(corpora):
    config = tiny_codec_run(steps=4)  # 32 vectors a batch; 16 for each of 32 codes
    trainer = Trainer(config, *corpora)
    given = []
    set_codebooks = trainer.model.set_codebooks
    trainer.model.set_codebooks = lambda batches: set_codebooks(
        given.append(b) or b for b in batches
    )
    trainer.fit()
    assert len(given) == 16 and all(batch.shape == (4, 64) for batch in given)


def test_a_stop_keeps_what_was_measured_and_a_checkpoint(corpora, tmp_path):
    trainer = Trainer(tiny_codec_run(steps=100), *corpora, tmp_path)
    seen = []

    class Stop(Progress):
        def update(self, record):
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
            seen.append(json.loads(lines[-1]) == record)  # before any checkpoint
            trainer.stop = record["step"] == 4

    trainer.progress = Stop()
    trainer.fit()
    assert seen == [True] * 3 and checkpoint.find(tmp_path).step == 5


def test_a_resumed_run_drops_records_past_its_checkpoint(corpora, tmp_path):
    Trainer(tiny_codec_run(steps=4), *corpora, tmp_path).fit()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99}\n')
    trainer = Trainer(tiny_codec_run(steps=6), *corpora, tmp_path)
    trainer.resume(checkpoint.find(tmp_path))
    trainer.fit()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]


def test_checkpoints_may_be_elsewhere_or_none(corpora, tmp_path):
    config = tiny_codec_run(steps=2)
    Trainer(config, *corpora, tmp_path / "a", checkpoints=None).fit()
    Trainer(config, *corpora, tmp_path / "b", checkpoints=tmp_path / "c").fit()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["metrics.jsonl"]
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["metrics.jsonl"]
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-00000002"]


def test_checkpoints_of_another_kind_are_refused(corpora, tmp_path):
    Trainer(tiny_codec_run(steps=2), *corpora, tmp_path / "codec").fit()
    Trainer(tiny_run(steps=2), *corpora, tmp_path / "lm").fit()
    with pytest.raises(CheckpointError, match="is of a codec, not of a language model"):
        load_model(tmp_path / "codec")
    with pytest.raises(CheckpointError, match="is of a language model, not of a codec"):
        load_model(tmp_path / "lm", config_type=CodecRunConfig)
    with pytest.raises(CheckpointError, match="is of a language model, not of a codec"):
        Trainer(tiny_codec_run(), *corpora).resume(checkpoint.find(tmp_path / "lm"))


def test_bfloat16_trains(corpora):
    config = tiny_codec_run(steps=30, learning_rate=1e-2, precision="bfloat16")
    trainer = Trainer(config, *corpora)
    trainer.fit()
    assert trainer.records[-1]["bits_per_byte"] < trainer.records[0]["bits_per_byte"] - 2
    assert all(t.dtype != torch.bfloat16 for t in trainer.model.state_dict().values())


def test_configs_do_not_mix():
    config = load_config("codec", config_type=CodecRunConfig)
    assert config.model.compression_ratio == 8
    with pytest.raises(ConfigError, match="unknown key model.embedding_size"):
        load_config("codec", config_type=RunConfig)

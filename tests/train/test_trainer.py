import json
import math
import time

import pytest
import torch

from sparsemoe.data import load_corpora
from sparsemoe.train import checkpoint
from sparsemoe.train.config import ConfigError
from sparsemoe.train.device import choose_device, choose_precision
from sparsemoe.train.progress import Progress
from sparsemoe.train.trainer import Trainer, TrainError, load_model
from tests.tiny_lm import tiny_run, write_files


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return load_corpora([write_files(tmp_path_factory.mktemp("data"))], held_out=0.2)


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in trainer.model.state_dict().items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


def test_learns(corpora, tmp_path):
    config = tiny_run(steps=120, learning_rate=1e-2, validate_every=60, validation_bytes=4096)
    trainer = Trainer(config, *corpora, tmp_path)
    trainer.fit()
    losses = [r["bits_per_byte"] for r in trainer.records if "bits_per_byte" in r]
    validation = [
        r["validation_bits_per_byte"] for r in trainer.records if "validation_bits_per_byte" in r
    ]
    assert losses[0] > 6 and losses[-1] < 2
    assert len(validation) == 2 and validation[1] < 2.5
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == trainer.records
    model, loaded = load_model(tmp_path)
    assert loaded == config
    assert_same_bits(dict(model.state_dict()), parameters(trainer))


def test_records_tell_of_the_experts(corpora):
    trainer = Trainer(tiny_run(model={"dense_layers": [0]}, steps=4), *corpora)
    trainer.fit()
    record = trainer.records[-1]
    assert record["step"] == record["total_steps"] == 4
    assert record["bytes"] == 4 * 4 * 32 == 4 * trainer.bytes_per_step
    assert len(record["load"]) == 1 and sum(record["load"][0]) == pytest.approx(1)
    assert record["dropped"] == 0
    assert record["bytes_per_second"] > 0 and record["gradient_norm"] > 0
    dense = Trainer(tiny_run(model={"num_experts": 0}, steps=4), *corpora)
    dense.fit()
    assert "load" not in dense.records[-1]


def test_accumulation_is_one_larger_batch(corpora):
    """With the losses of a dense model, which are means over tokens."""
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        config = tiny_run(
            {"num_experts": 0}, steps=3, batch_size=batch_size, accumulation=accumulation
        )
        trainer = Trainer(config, *corpora)
        trainer.fit()
        results.append(parameters(trainer))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)


def test_the_seed_decides_the_run(corpora):
    def run(seed: int) -> dict[str, torch.Tensor]:
        trainer = Trainer(tiny_run(seed=seed), *corpora)
        trainer.fit()
        return parameters(trainer)

    first = run(1)
    assert_same_bits(first, run(1))
    assert not torch.equal(first["embedding.weight"], run(2)["embedding.weight"])


RESUMED = {
    "moe": {},
    "jitter and bias": {"jitter": 0.1, "expert_bias_rate": 0.01},  # random numbers, a buffer
    "expert choice": {"router": "expert_choice"},
    "sinkhorn": {"router": "sinkhorn", "sinkhorn_inference": "bias"},
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("model", RESUMED.values(), ids=RESUMED)
def test_resumes_bit_for_bit(corpora, tmp_path, model, threads):
    torch.set_num_threads(threads)
    config = tiny_run(model, steps=10, save_every=5, keep=3, accumulation=2)
    whole = Trainer(config, *corpora, tmp_path / "whole")
    whole.fit()
    folder = tmp_path / "whole/checkpoints"
    assert [p.name for p in sorted(folder.iterdir())] == ["step-00000005", "step-00000010"]

    torch.manual_seed(1234)  # what came before must not matter
    torch.rand(7)
    resumed = Trainer(config, *corpora, tmp_path / "resumed")
    resumed.resume(checkpoint.find(folder / "step-00000005"))
    assert resumed.step == 5
    resumed.fit()
    assert_same_bits(parameters(resumed), parameters(whole))
    saved = [checkpoint.newest(tmp_path / f"{name}/checkpoints") for name in ("whole", "resumed")]
    assert_same_bits(saved[0].tensors("training"), saved[1].tensors("training"))
    assert saved[0].info["data"] == saved[1].info["data"]


def test_resume_continues_the_schedule_of_more_steps(corpora, tmp_path):
    Trainer(tiny_run(steps=4), *corpora, tmp_path).fit()
    trainer = Trainer(tiny_run(steps=6), *corpora, tmp_path)
    trainer.resume(checkpoint.find(tmp_path))
    trainer.fit()
    assert trainer.step == 6
    assert [r["step"] for r in trainer.records] == [2, 4, 6]


def test_resume_at_the_end_changes_nothing(corpora, tmp_path):
    config = tiny_run(steps=4)
    Trainer(config, *corpora, tmp_path).fit()
    trainer = Trainer(config, *corpora, tmp_path)
    trainer.resume(checkpoint.find(tmp_path))
    before = parameters(trainer)
    trainer.fit()
    assert trainer.step == 4
    assert_same_bits(parameters(trainer), before)


def test_resume_refuses_another_model_and_other_data(corpora, tmp_path):
    Trainer(tiny_run(steps=2), *corpora, tmp_path).fit()
    saved = checkpoint.find(tmp_path)
    with pytest.raises(ConfigError, match="model.num_experts is 8, but the checkpoint has 4"):
        Trainer(tiny_run({"num_experts": 8}), *corpora).resume(saved)
    with pytest.raises(ConfigError, match="files are not those"):
        Trainer(tiny_run(), *reversed(corpora)).resume(saved)


def test_resume_of_a_checkpoint_older_than_a_key(corpora, tmp_path):
    Trainer(tiny_run(steps=2), *corpora, tmp_path).fit()
    index = checkpoint.find(tmp_path).path / checkpoint.INDEX
    saved = json.loads(index.read_text())
    del saved["info"]["config"]["model"]["sinkhorn_iters"]
    index.write_text(json.dumps(saved))
    assert load_model(tmp_path)[1] == tiny_run(steps=2)
    Trainer(tiny_run(), *corpora).resume(checkpoint.find(tmp_path))
    with pytest.raises(ConfigError, match="model.sinkhorn_iters is 3, but the checkpoint has 8"):
        Trainer(tiny_run({"sinkhorn_iters": 3}), *corpora).resume(checkpoint.find(tmp_path))


def test_a_new_run_does_not_write_over_another(corpora, tmp_path):
    Trainer(tiny_run(steps=2), *corpora, tmp_path).fit()
    with pytest.raises(TrainError, match="holds checkpoints of another run"):
        Trainer(tiny_run(steps=2), *corpora, tmp_path).fit()


def test_a_loss_that_is_not_finite_stops_the_run(corpora):
    trainer = Trainer(tiny_run(learning_rate=1e30, clip_norm=1e30), *corpora)
    with pytest.raises(TrainError, match=r"the loss is (nan|inf) at step \d; a lower"):
        trainer.fit()


def test_ends_at_the_deadline(corpora):
    trainer = Trainer(tiny_run(minutes=10.0, steps=1), *corpora)
    started = time.monotonic()
    trainer.fit(deadline=started + 2)
    assert 1.5 < time.monotonic() - started < 4
    assert trainer.step == trainer.total_steps > 12
    rates = [r["learning_rate"] for r in trainer.records]
    assert rates[-1] < 0.5 * max(rates)


def test_a_run_that_had_its_time_goes_on_when_given_more(corpora, tmp_path):
    Trainer(tiny_run(minutes=0.01), *corpora, tmp_path).fit()
    saved = checkpoint.find(tmp_path)
    for minutes, goes_on in ((0.005, False), (0.03, True)):
        trainer = Trainer(tiny_run(minutes=minutes), *corpora, tmp_path)
        trainer.resume(saved)
        trainer.fit()
        assert (trainer.step > saved.step) == goes_on


def test_stops_with_a_checkpoint(corpora, tmp_path):
    trainer = Trainer(tiny_run(steps=100), *corpora, tmp_path)

    class Stop(Progress):
        def update(self, record):
            trainer.stop = record["step"] == 4

    trainer.progress = Stop()
    trainer.fit()
    assert trainer.step == 5 and checkpoint.find(tmp_path).step == 5


def test_validation_changes_nothing(corpora):
    results = []
    for validate_every in (0, 1):
        config = tiny_run({"jitter": 0.1}, validate_every=validate_every, validation_bytes=128)
        trainer = Trainer(config, *corpora)
        trainer.fit()
        results.append(parameters(trainer))
    assert_same_bits(*results)


def test_weight_decay_spares_gains(corpora):
    trainer = Trainer(tiny_run(), *corpora)
    decayed, spared = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    assert all("norm" in name for name in spared["param_names"])
    assert sum(map(len, (decayed["params"], spared["params"]))) == len(
        list(trainer.model.parameters())
    )


def test_device_and_precision():
    with pytest.raises(ConfigError, match="device 'abacus' cannot be used"):
        choose_device("abacus")
    cpu = choose_device("cpu")
    assert choose_precision("bfloat16", cpu) == "bfloat16"
    assert choose_precision("auto", cpu) in ("float32", "bfloat16")


def test_bfloat16_trains(corpora):
    trainer = Trainer(tiny_run(steps=30, learning_rate=1e-2, precision="bfloat16"), *corpora)
    trainer.fit()
    assert trainer.records[-1]["bits_per_byte"] < trainer.records[0]["bits_per_byte"] - 2
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert math.isfinite(trainer.validate())

import json

import pytest

from experiments.validate_codec import main
from tests.tiny_codec import OVERRIDES
from tests.tiny_lm import write_files

TRAIN = [
    *OVERRIDES,
    "train.minutes=null",
    "train.steps=12",
    "train.batch_size=2",
    "train.log_every=2",
    "train.validate_every=6",
    "train.validation_bytes=512",
    "data.held_out=0.2",
]


@pytest.fixture
def arguments(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "data")
    return ["--data", "data", "--out", "out", "--device", "cpu"]


def test_writes_figures_and_no_checkpoint(arguments, tmp_path, capsys):
    assert main([*arguments, "--compression_ratio", "4", "--tries", "2", *TRAIN]) == 0
    out = tmp_path / "out"
    names = sorted(p.name for p in out.iterdir())
    assert names == ["metrics.json", "metrics.jsonl", "plot.png"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["compression_ratio"] == 4 and metrics["steps"] == 12
    assert metrics["bytes"] == metrics["held_out_bytes"] > 0
    assert [s["stages"] for s in metrics["stages"]] == [1, 2]
    assert metrics["stages"][1]["total_bits"] > 0 and metrics["xz_bits_per_byte"] > 0
    (searched,) = metrics["searched"]
    assert searched["tries"] == 2 and searched["bytes"] == metrics["bytes"]
    assert searched["stages"] != metrics["stages"]
    text = capsys.readouterr().out
    for part in ("bytes right", "the best of 2 tries", "xz -9", "1 stage ", "out/plot.png"):
        assert part in text, part


def test_keeps_to_its_minutes_and_keeps_checkpoints_when_asked(arguments, tmp_path):
    options = ["--minutes", "0.12", "--checkpoints", "--max-bytes", "128"]
    overrides = [o for o in TRAIN if "minutes" not in o and "steps=12" not in o]
    assert main([*arguments, *options, *overrides]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["seconds"] < 0.12 * 60 + 3
    assert metrics["steps"] > 5 and 64 < metrics["bytes"] <= 128
    assert len(list((tmp_path / "out/checkpoints").iterdir())) == 1


def test_a_run_that_ends_too_early_says_so(arguments, capsys):
    assert main([*arguments, *TRAIN, "model.unquantized_accuracy=0.99"]) == 1
    assert "step 12 is too early" in capsys.readouterr().err


def test_mistakes_are_one_line(arguments, capsys):
    for extra, message in (
        (["--compression_ratio", "3"], "compression_ratio is 3"),
        (["--tries", "-1"], "--tries must be 0 or more, got -1"),
        (["model.code_dims=3"], "nearest known key is model.code_dim"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
    ):
        assert main([*arguments, *extra]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

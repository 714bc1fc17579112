"""sparsemoe codec train and eval."""

import json

import pytest

from sparsemoe.cli import main
from tests.cli.test_cli import error_of
from tests.tiny_codec import OVERRIDES
from tests.tiny_lm import SHORT, write_files

TRAIN = [*OVERRIDES, *SHORT]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run, and its data beside it."""
    folder = tmp_path_factory.mktemp("codec")
    data = str(write_files(folder / "data"))
    assert main(["codec", "train", "--data", data, *TRAIN, "--out", str(folder / "run")]) == 0
    return folder


def test_train_writes_a_run(run):
    assert (run / "run/config.yaml").exists()
    assert [p.name for p in (run / "run/checkpoints").iterdir()] == ["step-00000006"]
    lines = (run / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]


def test_train_resumes_for_some_minutes(run, capsys):
    """The minutes are of the whole run, and its first steps have used some."""
    lines = (run / "run/metrics.jsonl").read_text().splitlines()
    minutes = str((2 * json.loads(lines[-1])["seconds"] + 5) / 60)
    arguments = ["codec", "train", "--out", str(run / "run"), "--resume", "--minutes", minutes]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "resumed" in text and "at step 6" in text
    assert int(text.split("\nstep ")[-1].split(";")[0]) > 6


def test_eval(run, capsys):
    arguments = ["codec", "eval", "--checkpoint", str(run / "run"), "--device", "cpu"]
    assert main([*arguments, "--json"]) == 0
    held_out = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--json", "--data", str(run / "data")]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert 0 < held_out["bytes"] < everything["bytes"]
    assert everything["bytes"] == sum(f.stat().st_size for f in (run / "data").rglob("*.py"))
    last = everything["stages"][-1]
    assert last["total_bits"] == pytest.approx(last["code_bits"] + last["reconstruction_bits"])
    assert 0 < everything["xz_bits_per_byte"] < 8
    assert main([*arguments, "--json", "--tries", "2"]) == 0
    searched = json.loads(capsys.readouterr().out)
    assert searched["tries"] == 2 and searched["stages"] != held_out["stages"]
    assert main(arguments) == 0
    assert "total without loss" in capsys.readouterr().out


def test_mistakes_are_one_line(run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codec = str(run / "run")
    for arguments, message in (
        (["codec", "train", "model.code_dims=8"], "nearest known key is model.code_dim"),
        (["codec", "train", "model.compression_ratio=5"], "compression_ratio is 5"),
        (["codec", "train", "--out", codec], "add --resume"),
        (["codec", "train", "--out", codec, "--resume", "model.code_dim=8"], "model.code_dim is 8"),
        (["codec", "eval", "--checkpoint", "no/such/run"], "no complete checkpoint"),
        (["codec", "eval", "--checkpoint", codec, "--tries", "-1"], "--tries must be 0 or more"),
        (["generate", "--checkpoint", codec], "is of a codec, not of a language model"),
        (["train", "--out", codec, "--resume"], "is of a codec, not of a language model"),
    ):
        assert message in error_of(capsys, *arguments)
    early = ["codec", "train", "--data", str(run / "data"), *TRAIN, "--out", "early"]
    assert main([*early, "model.unquantized_accuracy=0.99"]) == 0
    capsys.readouterr()
    assert "does not quantize yet" in error_of(capsys, "codec", "eval", "--checkpoint", "early")

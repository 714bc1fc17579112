import contextlib
import json

import pytest
import torch

from sparsemoe.train import checkpoint
from sparsemoe.train.checkpoint import CheckpointError

TENSORS = {"model": {"a": torch.arange(100.0), "b": torch.ones(3, 4).t()}, "training": {}}


def save(folder, step, keep=1):
    return checkpoint.save(folder, step, TENSORS, {"note": step}, keep)


def test_gives_back_what_was_saved(tmp_path):
    path = save(tmp_path, 12)
    found = checkpoint.newest(tmp_path)
    assert found.path == path and found.step == 12 and found.info == {"note": 12}
    tensors = found.tensors("model")
    assert all(torch.equal(tensors[name], t) for name, t in TENSORS["model"].items())
    assert found.tensors("training") == {}
    assert sorted(p.name for p in path.iterdir()) == [
        "checkpoint.json",
        "model.safetensors",
        "training.safetensors",
    ]


def test_keeps_the_newest(tmp_path):
    for step in (1, 5, 10, 200):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000200"]
    save(tmp_path, 1000, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00001000"]


def test_finds_by_run_folder_or_own_folder(tmp_path):
    path = save(tmp_path / "checkpoints", 7)
    for place in (tmp_path, tmp_path / "checkpoints", path):
        assert checkpoint.find(place).path == path
    with pytest.raises(CheckpointError, match="no complete checkpoint in"):
        checkpoint.find(tmp_path / "elsewhere")
    assert checkpoint.newest(tmp_path) is None


def test_passes_over_what_is_not_complete(tmp_path):
    save(tmp_path, 3)
    (tmp_path / ".writing-step-00000009").mkdir()
    (tmp_path / "step-00000008").mkdir()  # no index
    (tmp_path / "step-7-copy").mkdir()
    assert checkpoint.newest(tmp_path).step == 3
    save(tmp_path, 4)
    assert not list(tmp_path.glob(".writing-*"))


def test_a_step_is_not_saved_twice(tmp_path):
    save(tmp_path, 3)
    with pytest.raises(CheckpointError, match="step-00000003 exists already"):
        save(tmp_path, 3)


@pytest.mark.parametrize("size", [0, 10, -1])
def test_a_cut_file_is_named(tmp_path, size):
    file = save(tmp_path, 3) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: it has") as caught:
        checkpoint.newest(tmp_path).tensors("model")
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_a_changed_file_is_named(tmp_path):
    file = save(tmp_path, 3) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: its contents"):
        checkpoint.newest(tmp_path).tensors("model")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        checkpoint.newest(tmp_path).tensors("model")


@pytest.mark.parametrize("text", ["", '{"format": 1, "step"', "[]", "{}"])
def test_a_damaged_index_is_named(tmp_path, text):
    (save(tmp_path, 3) / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"checkpoint.json is damaged"):
        checkpoint.newest(tmp_path)


def test_another_format_is_refused(tmp_path):
    file = save(tmp_path, 3) / "checkpoint.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "format": 99}))
    with pytest.raises(CheckpointError, match=r"is of format 99; this version reads 1"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("flush", range(6))
def test_an_interruption_at_any_moment_leaves_one_whole(tmp_path, monkeypatch, flush):
    save(tmp_path, 1)
    calls = []

    def interrupted(path):
        calls.append(path)
        if len(calls) == flush + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_flush", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        save(tmp_path, 2)
    found = checkpoint.newest(tmp_path)
    assert found.step == (2 if flush >= 4 else 1)  # the fifth follows the rename
    assert torch.equal(found.tensors("model")["a"], TENSORS["model"]["a"])
    monkeypatch.undo()
    save(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]

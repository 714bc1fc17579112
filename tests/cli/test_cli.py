import json
import subprocess
import sys
import types

import pytest
import torch

from sparsemoe.cli import main, parse
from tests.tiny_lm import OVERRIDES, SHORT, write_files

TRAIN = [*OVERRIDES, *SHORT]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run, and its data beside it."""
    folder = tmp_path_factory.mktemp("cli")
    write_files(folder / "data")
    arguments = ["train", "--data", str(folder / "data"), *TRAIN, "--out", str(folder / "run")]
    assert main(arguments) == 0
    return folder


def error_of(capsys, *arguments: object) -> str:
    """What a command that fails prints: one line."""
    assert main([str(a) for a in arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"sparsemoe {arguments[0]}: ")
    return error


COMMANDS = ["", "demo", "train", "generate", "evaluate", "bench", "info"]
CODEC_COMMANDS = ["codec", "codec train", "codec eval"]


@pytest.mark.parametrize("command", COMMANDS + CODEC_COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "usage: sparsemoe" in text
    if not command:
        for name in ("demo", "train", "generate", "evaluate", "codec", "bench", "info"):
            assert f"\n    {name} " in text


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "sparsemoe.cli", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "sparsemoe demo" in done.stdout


def test_train_writes_a_run(run):
    assert (run / "run/config.yaml").exists()
    assert [p.name for p in (run / "run/checkpoints").iterdir()] == ["step-00000006"]
    lines = (run / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]


def test_train_resumes_with_its_own_config(run, capsys):
    assert main(["train", "--out", str(run / "run"), "--resume", "train.steps=8"]) == 0
    text = capsys.readouterr().out
    assert "resumed" in text and "at step 6" in text and "step 8;" in text


def test_train_refuses_a_run_that_is_there(run, capsys):
    assert "add --resume" in error_of(capsys, "train", "--out", run / "run")
    assert "to resume from" in error_of(capsys, "train", "--out", run / "none", "--resume")
    error = error_of(capsys, "train", "--out", run / "run", "--resume", "model.num_experts=8")
    assert "model.num_experts is 8, but the checkpoint has 4" in error


def test_generate_repeats_with_the_seed(run, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        arguments = ["generate", "--checkpoint", str(run / "run"), "--prompt", "dé"]
        assert main([*arguments, "--bytes", "30", "--seed", seed, "--device", "cpu"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("dé")


def test_evaluate(run, capsys):
    arguments = ["evaluate", "--checkpoint", str(run / "run"), "--device", "cpu", "--json"]
    assert main(arguments) == 0
    held_out = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--data", str(run / "data"), "--overlap", "0"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert 0 < held_out["bytes"] < everything["bytes"]
    total = sum(f.stat().st_size for f in (run / "data").rglob("*.py"))
    assert everything["bytes"] == total and everything["overlap"] == 0
    assert 2 < held_out["bits_per_byte"] < 9 and 0 < held_out["xz_bits_per_byte"] < 8
    assert main(arguments[:-1]) == 0
    assert "bits per byte over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "model.hiden_size=8"], "nearest known key is model.hidden_size"),
        (["train", "--data", "no/such/place", "model.top_k=1"], "no/such/place does not exist"),
        (["train", "--config", "no.yaml"], "cannot read config no.yaml"),
        (["train", "train.device=abacus", "--data", __file__], "device 'abacus' cannot be used"),
        (["generate", "--checkpoint", "no/such/run"], "no complete checkpoint in no/such/run"),
        (["generate", "--checkpoint", "x", "--top-p", "2"], "top_p is 2.0"),
        (["evaluate", "--checkpoint", "no/such/run"], "no complete checkpoint"),
        (["bench", "train.minute=1"], "nearest known key is train.minutes"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *arguments)


def test_a_cut_checkpoint_is_named(run, capsys, tmp_path):
    whole = next((run / "run/checkpoints").iterdir())
    cut = tmp_path / "step-00000001"
    cut.mkdir()
    for file in whole.iterdir():
        (cut / file.name).write_bytes(file.read_bytes())
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    error = error_of(capsys, "generate", "--checkpoint", cut)
    assert f"{weights} is damaged: it has 1000 bytes" in error


def test_overrides_may_stand_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.a=b").write_text("a file of this name")
    args = parse(
        ["train", "model.a=1", "--data", "x", "data.b=2", "y", "model.a=b", "--out", "z", "c.d=3"]
    )
    assert args.data == ["x", "y", "model.a=b"]
    assert args.overrides == ["model.a=1", "data.b=2", "c.d=3"]
    assert parse(["generate", "--checkpoint", "x", "--prompt", "a.b=c"]).prompt == "a.b=c"


def test_bench(run, capsys):
    arguments = ["bench", "--steps", "2", "--json", *TRAIN, f"data.paths=[{run / 'data'}]"]
    assert main(arguments) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["device"] == "cpu"
    assert all(v > 0 for k, v in values.items() if k.endswith("second"))


def test_info(capsys):
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert "version" in json.loads(capsys.readouterr().out)


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """Stands in for Python's own library, which takes seconds to read and evaluate."""
    from sparsemoe import demo
    from sparsemoe.data import load_corpora

    folder = write_files(tmp_path / "library")
    monkeypatch.setattr(demo, "load_standard_library", lambda *_: load_corpora([folder], 0.2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo(small_library, capsys):
    arguments = ["demo", "--minutes", "0.2", "--compare-dense", "--device", "cpu", *OVERRIDES]
    arguments += ["train.batch_size=4", "train.log_every=2", "train.validate_every=20"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for part in ("step ", "--- a sample", "bits per byte, held-out", "xz -9 on the same bytes"):
        assert part in text, part
    out = small_library / "runs/demo"
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert str(out.relative_to(small_library) / "plot.png") in text
    summary = json.loads((out / "demo.json").read_text())
    moe, dense = summary["mixture of experts"], summary["dense"]
    assert moe["bytes_trained"] == dense["bytes_trained"] > 0
    assert moe["flops_per_token"] == pytest.approx(dense["flops_per_token"], rel=0.02)
    assert summary["device"] == "cpu" and summary["build"]["torch"] == torch.__version__
    assert 0 < moe["bits_per_byte"] < 9 and 0 < dense["bits_per_byte"] < 9
    assert main(["generate", "--checkpoint", "runs/demo", "--bytes", "5", "--device", "cpu"]) == 0
    assert main([*arguments[:3], *arguments[4:]]) == 0  # a second time, over the first


def test_demo_leaves_other_folders_alone(small_library, capsys):
    (small_library / "mine").mkdir()
    (small_library / "mine/thesis.txt").write_text("x")
    assert "not a demo's" in error_of(capsys, "demo", "--out", "mine")
    assert (small_library / "mine/thesis.txt").exists()


def test_interrupt_is_quiet(monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "sparsemoe.cli.parse", lambda _: types.SimpleNamespace(run=stop, command="train")
    )
    assert main([]) == 130
    assert capsys.readouterr().err == "\nsparsemoe train: stopped\n"


def test_a_stalled_measurement_leaves_time_to_train(small_library, monkeypatch):
    """What a busy machine does to the estimate must not eat the demo's minutes."""
    from sparsemoe import demo
    from sparsemoe.train.trainer import Trainer
    from tests.tiny_lm import tiny_run

    corpora = demo.load_standard_library()
    clock = iter(range(0, 10_000, 50))  # each look at the clock is 50 seconds later
    monkeypatch.setattr(demo.time, "monotonic", lambda: float(next(clock)))
    assert demo._seconds_after_training(Trainer(tiny_run(), *corpora), corpora[1], 180.0) == 45.0

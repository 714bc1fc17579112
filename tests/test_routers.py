"""The comparison of routers runs at a size that takes no time, and its page holds what it found."""

import json
from pathlib import Path

import pytest
import torch

from bench import routers, routers_page
from tests.tiny_lm import OVERRIDES, one_thread, write_files  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


def run(out: Path, data: Path, *more: str) -> None:
    overrides = [*OVERRIDES, "train.batch_size=2", "train.log_every=2", f"data.paths=[{data}]"]
    routers.main(
        ["--out", str(out), "--steps", "4", "--device", "cpu", "--config", "demo", "--every", "0"]
        + ["--commit", "abc123", "--set", *overrides, "data.held_out=0.2", *more]
    )


def test_runs_goes_on_and_renders(tmp_path, capsys):
    data, out = write_files(tmp_path / "data"), tmp_path / "results" / "tiny"
    run(out, data, "--only", "topk", "sinkhorn")
    said = capsys.readouterr().out
    assert "topk, seed 0: step 2/4, " in said
    assert "sinkhorn, seed 0: Sinkhorn, learned bias at inference: " in said
    run(out, data, "--seeds", "0", "1")
    said = capsys.readouterr().out
    assert "sinkhorn, seed 0: measured already" in said and "topk, seed 1: top-k, no" in said
    run(out, data, "--time", "--turns", "1")
    names = {f"{way}-{seed}.json" for way in routers.WAYS for seed in (0, 1)} | {routers.TIMES}
    assert {path.name for path in out.iterdir()} == names

    found = [json.loads((out / f"topk-{seed}.json").read_text()) for seed in (0, 1)]
    row = found[0]["rows"]["top-k, no balancing"]
    assert 0 < row["bits per byte"] < 9 and row["experts a token"] == 2
    assert 1 <= row["largest load"] <= 2 and 1 <= found[0]["training"]["largest load"] <= 2
    bits = [result["rows"]["top-k, no balancing"]["bits per byte"] for result in found]
    page = routers_page.render([out])
    low, high = sorted(f"{value:.3f}" for value in bits)
    line = next(line for line in page.splitlines() if line.startswith("| top-k, no balancing"))
    assert f"{sum(bits) / 2:.3f} ({low} to {high})" in line or low == high
    assert f"| {json.loads((out / routers.TIMES).read_text())['step ms']['topk']:.1f} |" in line
    for way in routers.WAYS.values():
        assert all(f"\n| {row} |" in page for row in way.rows)
    assert "- commit: abc123\n" in page and "- seeds: 0, 1\n" in page and str(tmp_path) not in page

    run(out, data, "--only", "topk", "--set", *OVERRIDES, f"data.paths=[{data}]")
    assert "topk, seed 0: top-k, no" in capsys.readouterr().out  # other settings: measured again
    with pytest.raises(ValueError, match="topk-0.json has other settings than exp.*; measure one"):
        routers_page.render([out])


def test_ways_differ_in_nothing_but_balancing(tmp_path):
    base = routers.load_config("demo", OVERRIDES)
    for name in routers.WAYS:
        config = routers.config_of(name, base, seed=3)
        assert config.train.seed == 3
        changed = {
            key for key, value in vars(config.model).items() if value != getattr(base.model, key)
        }
        assert changed <= {"load_balance_weight", *routers.WAYS[name].model}
        assert (config.model.load_balance_weight > 0) == (name == "topk-loss")


def test_loads_and_drops():
    counts = torch.tensor([[[8, 8, 8, 8], [20, 4, 4, 4]], [[11, 9, 6, 6], [32, 0, 0, 0]]])
    assert routers.largest_load(counts) == pytest.approx((1 + 2.5 + 11 / 8 + 4) / 4)
    # 16 tokens of 2 experts: a capacity of 10 pairs an expert
    assert routers.dropped_share(counts, 16, 2) == pytest.approx((0 + 10 + 1 + 22) / 32 / 4)
    # 17 tokens: 10.625 pairs, rounded up
    assert routers.dropped_share(counts, 17, 2) == pytest.approx((0 + 9 + 0 + 21) / 32 / 4)


def test_a_range_is_given_where_there_is_one():
    assert routers_page.spread([1.0, 1.25], 2) == "1.12 (1.00 to 1.25)"
    assert routers_page.spread([2.0, 2.001], 2) == routers_page.spread([2.0], 2) == "2.00"


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "topk-0.json"
    routers.write(path, {"settings": 1})
    with pytest.raises(TypeError):
        routers.write(path, {"settings": object()})
    assert routers.measured_with(path, 1) and not routers.measured_with(path, 2)
    assert not routers.measured_with(tmp_path / "other.json", 1)


def test_page_is_made_from_the_results():
    page = routers_page.render(routers_page.RESULTS.glob("*"))
    assert routers_page.PAGE.read_text() == page, "run: python -m bench.routers --render"
    assert "No results yet." in routers_page.render([])

"""docs/benchmarks.md holds what was measured and nothing that was typed."""

from pathlib import Path

from make_benchmark_docs import PAGE, ROOT, comparison, rate, render


def test_page_is_made_from_the_results():
    results = list((ROOT / "bench" / "results").glob("*.json"))
    assert PAGE.read_text() == render(results), "run: python tools/make_benchmark_docs.py"


def test_a_page_of_one_result(tmp_path: Path):
    (tmp_path / "gpu.json").write_text(
        """{"environment": {"device": "GPU", "commit": null}, "families": ["moe"],
        "shapes": {"small": "T=1"}, "counts": {"gate": "reads logits"}, "results": [
        {"shape": "small", "op": "gate", "implementation": "sparsemoe", "ms": 0.5, "GB/s": 2000.0,
         "floor ms": 0.4, "ratio to floor": 1.25},
        {"shape": "small", "op": "gate", "implementation": "torch", "ms": 2.0, "GB/s": 500.0,
         "floor ms": 0.4, "ratio to floor": 5.0},
        {"shape": "small", "op": "gate", "implementation": "torch, other", "ms": 1.0, "GB/s": 1e3,
         "floor ms": 0.4, "ratio to floor": 2.5},
        {"shape": "small", "op": "gate", "implementation": "peer", "failed": "no GPU"}]}"""
    )
    page = render([tmp_path / "gpu.json"])
    assert "| gate | 0.5 | 2 TB/s | 0.4 | 1.25 | 1 (other) | 2 |  |  |" in page
    assert "| gate | 0.5 | 2 | 1 | failed |" in page
    assert "- gate, peer: no GPU" in page
    assert "- gate: reads logits" in page
    assert "## GPU: moe\n" in page
    assert "commit" not in page


def test_a_rate_is_of_what_sets_the_floor():
    row = {"GB/s": 2400.0, "TFLOP/s": 393.0, "% of matmul": 50.1, "ratio to floor": 1.996}
    assert rate(row) == "393 TFLOP/s, 50 %"
    assert rate(row | {"ratio to floor": 1.25}) == "2.4 TB/s"
    assert rate({"GB/s": 900.0, "TFLOP/s": 0.9, "ratio to floor": 1.25}) == "900 GFLOP/s"


def test_a_layer_lists_memory_and_slow_launches(tmp_path: Path):
    (tmp_path / "gpu.json").write_text(
        """{"environment": {"device": "GPU"}, "families": ["experts"], "counts": {},
        "shapes": {"decode": "T=1"}, "results": [
        {"shape": "decode", "op": "layer", "implementation": "sparsemoe", "ms": 0.1, "GB/s": 2000.0,
         "floor ms": 0.09, "ratio to floor": 1.1, "extra MiB": 5.0, "call ms": 0.3},
        {"shape": "decode", "op": "layer", "implementation": "torch", "ms": 0.3, "GB/s": 900.0,
         "floor ms": 0.09, "ratio to floor": 3.3, "extra MiB": 0.0, "call ms": 0.31}]}"""
    )
    page = render([tmp_path / "gpu.json"])
    assert "Peak memory above the inputs, MiB: layer: sparsemoe 5.\n" in page
    assert "takes longer, ms: layer: sparsemoe 0.3.\n" in page


def test_codes_that_differ_are_listed(tmp_path: Path):
    (tmp_path / "gpu.json").write_text(
        """{"environment": {"device": "GPU"}, "families": ["rvq"], "counts": {},
        "shapes": {"small": "N=1"}, "results": [
        {"shape": "small", "op": "encode", "implementation": "sparsemoe", "ms": 1.0, "GB/s": 900.0,
         "floor ms": 0.9, "ratio to floor": 1.1, "other codes, %": 0.0},
        {"shape": "small", "op": "encode", "implementation": "torch, tf32", "ms": 1.0,
         "GB/s": 900.0, "floor ms": 0.9, "ratio to floor": 1.1, "other codes, %": 1.234}]}"""
    )
    text = "Codes that are not the reference's, %: encode: sparsemoe 0, torch, tf32 1.23.\n"
    assert text in render([tmp_path / "gpu.json"])


def test_comparison_names_what_failed():
    rows = [
        {"shape": "s", "op": "o", "implementation": "sparsemoe", "ms": 1.0, "floor ms": 0.5,
         "ratio to floor": 2.0, "GB/s": 10.0},
        {"shape": "s", "op": "o", "implementation": "torch", "failed": "ValueError: x"},
    ]  # fmt: skip
    assert comparison(rows)[-1] == "failed: o, s, torch: ValueError: x"

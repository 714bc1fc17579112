"""Runs one benchmark at a time: check it, time it, write it down."""

from __future__ import annotations

import fnmatch
import functools
import gc
import json
import re
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import peers, timing
from bench.case import Op, difference, measurement


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--results", metavar="FILE", help="write the measurements here, as JSON")
    group.addoption("--commit", help="what was measured, where git does not say")
    group.addoption("--compile-only", metavar="I/N", help="fill compilers' caches, a share of them")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    known = parent.config.getini("python_files")
    if fnmatch.fnmatch(file_path.name, "bench_*.py") and not (
        "bench_*.py" in known or parent.session.isinitpath(file_path)
    ):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def share(config: pytest.Config) -> tuple[int, int] | None:
    option = config.getoption("--compile-only")
    return tuple(map(int, option.split("/"))) if option else None


def pytest_configure(config: pytest.Config) -> None:
    if peers.COMPILED and timing.DEVICE.type == "cuda":
        peers.shorten_autotuning(*(share(config) or (0, 1)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if share(config):
        index, count = share(config)
        compiled = [item for item in items if item.callspec.params["name"] == "torch-compiled"]
        peer = [item for item in items if item.callspec.params["name"] in peers.COMPILED]
        items[:] = compiled[index::count] + peer


class Results:
    """What was measured so far; rewritten after every benchmark, so that nothing is lost."""

    def __init__(self, path: str | None, commit: str | None) -> None:
        self.path = path and Path(path)
        self.commit = commit
        self.header: dict[str, Any] = {
            "environment": {},
            "families": [],
            "shapes": {},
            "counts": {},
        }
        self.rows: list[dict[str, Any]] = []

    def add(self, family: str, shape: Any, op: Op, name: str, found: dict[str, Any]) -> None:
        self.header["environment"] = self.header["environment"] or timing.environment(self.commit)
        if family not in self.header["families"]:
            self.header["families"].append(family)
        self.header["shapes"][shape.name] = str(shape)
        self.header["counts"][op.name] = op.counts
        key = {"shape": shape.name, "op": op.name, "implementation": name}
        self.rows.append(key | found)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self.text())

    def text(self) -> str:
        """One measurement a line."""
        parts = [f'"{key}": {json.dumps(value, indent=1)}' for key, value in self.header.items()]
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        return "{\n" + ",\n".join([*parts, f'"results": [\n{rows}\n]']) + "\n}\n"


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    option = request.config.getoption
    request.config.bench_results = Results(option("--results"), option("--commit"))
    return request.config.bench_results


@functools.lru_cache(maxsize=1)
def inputs_of(make: Any, shape: Any) -> Any:
    gc.collect()
    if timing.DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    return make(shape)


@functools.lru_cache(maxsize=1)
def expected_of(make: Any, shape: Any, op: Op) -> list[torch.Tensor]:
    inputs = inputs_of(make, shape)
    return [t.detach() for t in op.view(inputs, op.calls["reference"](inputs)())]


@functools.lru_cache(maxsize=1)
def turns_of(make: Any, shape: Any, op: Op, names: tuple[str, ...]) -> dict[str, float]:
    inputs = inputs_of(make, shape)
    return timing.in_turns(
        {n: functools.partial(op.calls[n], inputs) for n in names if n != "reference"}
    )


@pytest.fixture
def measure(benchmark: Any, results: Results, request: pytest.FixtureRequest) -> Any:
    """measure(make_inputs, shape, op, implementation). Fails where ours is wrong or breaks; where
    another is or does, that is noted in the results and the benchmark is skipped."""
    family = request.path.stem.removeprefix("bench_")

    def run(make: Any, shape: Any, op: Op, name: str) -> None:
        benchmark.group = f"{op.name}, {shape.name}"
        if share(request.config):
            benchmark.skipped = True
            size = shape if name == "torch-compiled" else shape.to_compile
            with torch.no_grad():
                op.calls[name](inputs_of(make, size))()
            return
        message = None
        try:
            found = attempt(make, shape, op, name)
        except Exception as error:
            message = (str(error).strip().splitlines() or [""])[0]
            message = re.sub(r"(/[\w.-]+)+/", "", f"{type(error).__name__}: {message}")[:120]
            results.add(family, shape, op, name, {"failed": message})
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of what failed
            if name in ("sparsemoe", "reference"):
                raise
        if message:
            benchmark.skipped = True
            pytest.skip(f"failed: {message}")
        benchmark.extra_info.update(found)

    def attempt(make: Any, shape: Any, op: Op, name: str) -> dict[str, Any]:
        inputs = inputs_of(make, shape)
        with torch.no_grad():
            call = op.calls[name](inputs)
            result = call()
            facts = op.facts(inputs, result)
            result = list(op.view(inputs, result))
            wrong = difference(op, shape, result, expected_of(make, shape, op), name)
            del result
            if wrong:
                raise AssertionError(wrong)
            if not benchmark.enabled:
                benchmark.pedantic(call)
                return {}
            ms = None
            if name != "reference":
                items = [getattr(item, "callspec", None) for item in request.session.items]
                cases = [item.params for item in items if item]
                rivals = [c["name"] for c in cases if c.get("shape") is shape and c.get("op") is op]
                ms = turns_of(make, shape, op, tuple(rivals)).get(name)
            found = measurement(op, inputs, call, ms) | facts
            repeats = min(max(int(30 / found["ms"]), 1), 200)
            benchmark.pedantic(call, rounds=3 if repeats > 1 else 1, iterations=repeats)
        found["call ms"] = float(f"{1e3 * benchmark.stats.stats.median:.4g}")
        results.add(family, shape, op, name, found)
        return found | {"environment": results.header["environment"]}

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = getattr(config, "bench_results", None)
    if not found or not found.rows:
        return
    from make_benchmark_docs import comparison

    terminalreporter.section("benchmarks, ms")
    for line in comparison(found.rows):
        terminalreporter.line(line)

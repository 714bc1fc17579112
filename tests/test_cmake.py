"""CMake's build: the C++ tests, and the CPU kernels called from numpy beside the torch ops."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsemoe import ops

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
CMAKE = shutil.which("cmake", path=PROGRAMS)

pytestmark = pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def build():
    """The folder of the build, kept between runs so that only what changed is compiled."""
    pytest.importorskip("pybind11")
    folder = ROOT / "build" / f"cmake-cp{sys.version_info[0]}{sys.version_info[1]}"
    cache = folder / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
        shutil.rmtree(folder)  # the tree was moved
    options = [
        "-DSPARSEMOE_BUILD_TORCH=ON",
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    run(CMAKE, "-S", str(ROOT), "-B", str(folder), *options)
    run(CMAKE, "--build", str(folder), "--parallel", str(os.cpu_count()))
    return folder


@pytest.fixture(scope="module")
def kernels(build):
    [path] = build.glob("sparsemoe_kernels*.so")
    spec = importlib.util.spec_from_file_location("sparsemoe_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ctest(build):
    ctest = str(Path(CMAKE).with_name("ctest"))
    output = run(ctest, "--test-dir", str(build), "--output-on-failure")
    assert "100% tests passed" in output


def test_compile_commands(build):
    assert "csrc/moe/gate_cpu.cpp" in (build / "compile_commands.json").read_text()


def test_op_library(build):
    """In a process of its own, where the package has not registered the same ops."""
    [library] = [*build.glob("libsparsemoe.so"), *build.glob("libsparsemoe.dylib")]
    output = run(
        sys.executable,
        "-c",
        f"import torch; torch.ops.load_library({str(library)!r}); "
        "print(torch.ops.sparsemoe.gate(torch.tensor([[0.0, 2.0, 1.0]]), 2)[1].tolist())",
    )
    assert output.strip() == "[[1, 2]]"


DTYPES = {np.float16: torch.float16, np.float32: torch.float32, np.float64: torch.float64}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scoring": "sigmoid", "renormalize": True, "scale": 2.5},
        {"scoring": "softmax_after_topk"},
        {"scoring": "sigmoid", "n_group": 4, "topk_group": 2},
    ],
    ids=str,
)
def test_gate(kernels, dtype, options):
    logits = np.random.default_rng(0).normal(size=(1000, 24)).astype(dtype)
    weights, experts, logsumexp = kernels.gate(logits, 4, **options)
    gate = ops.moe.gate(torch.from_numpy(logits), 4, **options)
    np.testing.assert_array_equal(experts, gate.experts)
    np.testing.assert_array_equal(weights, gate.weights)
    np.testing.assert_array_equal(logsumexp, gate.logsumexp)


def test_gate_with_bias_and_mask(kernels):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(300, 16)).astype(np.float32)
    bias = rng.normal(size=16).astype(np.float32)
    mask = rng.random(300) < 0.5
    weights, experts, _ = kernels.gate(logits, 3, scoring="sigmoid", bias=bias, mask=mask)
    gate = ops.moe.gate(
        torch.from_numpy(logits),
        3,
        scoring="sigmoid",
        bias=torch.from_numpy(bias),
        mask=torch.from_numpy(mask),
    )
    np.testing.assert_array_equal(experts, gate.experts)
    np.testing.assert_array_equal(weights, gate.weights)


@pytest.mark.parametrize("capacity", [None, 100, 0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_way_of_a_token(kernels, capacity, dtype):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(500, 40)).astype(dtype)
    weights, experts, _ = kernels.gate(rng.normal(size=(500, 12)).astype(dtype), 3)
    mine = kernels.plan(experts, 12, capacity=capacity)
    theirs = ops.moe.plan(torch.from_numpy(experts), 12, capacity=capacity)
    for field in ("offsets", "counts", "row_token", "row_pair", "token_rows"):
        np.testing.assert_array_equal(getattr(mine, field), getattr(theirs, field), field)
    rows = kernels.dispatch(x, mine)
    np.testing.assert_array_equal(rows, ops.moe.dispatch(torch.from_numpy(x), theirs))
    for w in (None, weights):
        y = ops.moe.combine(
            torch.from_numpy(rows), theirs, None if w is None else torch.from_numpy(w)
        )
        np.testing.assert_array_equal(kernels.combine(rows, mine, w), y)


def test_plan_by_weight(kernels):
    rng = np.random.default_rng(3)
    experts = rng.integers(0, 4, size=(64, 2), dtype=np.int32)
    weights = rng.random((64, 2), dtype=np.float32)
    mine = kernels.plan(experts, 4, capacity=10, weights=weights)
    theirs = ops.moe.plan(
        torch.from_numpy(experts),
        4,
        capacity=10,
        drop_policy="weight",
        weights=torch.from_numpy(weights),
    )
    np.testing.assert_array_equal(mine.token_rows, theirs.token_rows)


def test_no_tokens(kernels):
    weights, experts, _ = kernels.gate(np.zeros((0, 4), np.float32), 2)
    plan = kernels.plan(experts, 4)
    assert plan.offsets.tolist() == [0] * 5
    rows = kernels.dispatch(np.zeros((0, 8), np.float32), plan)
    assert kernels.combine(rows, plan, weights).shape == (0, 8)


def test_strided_input(kernels):
    logits = np.random.default_rng(4).normal(size=(16, 50)).astype(np.float32).T[::2]
    np.testing.assert_array_equal(kernels.gate(logits, 2)[1], kernels.gate(logits.copy(), 2)[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: k.gate(np.zeros(4, np.float32), 1), "logits must have two dimensions"),
        (lambda k: k.gate(np.zeros((2, 4), np.int64), 1), "logits must be float16"),
        (lambda k: k.gate(np.zeros((2, 4), np.float32), 5), "top_k must be"),
        (lambda k: k.gate(np.zeros((2, 4), np.float32), 1, scoring="x"), "scoring must be"),
        (lambda k: k.gate(np.zeros((2, 4), np.float32), 1, bias=np.zeros(3)), "bias must have"),
        (lambda k: k.gate(np.zeros((2, 4), np.float32), 1, n_group=3), "n_group must be"),
        (lambda k: k.plan(np.zeros(3, np.int32), 2), "experts must have two dimensions"),
        (lambda k: k.plan(np.zeros((3, 1), np.int32), 0), "num_experts must be"),
        (lambda k: k.plan(np.zeros((3, 1), np.int32), 2, capacity=-1), "capacity must not be"),
        (lambda k: k.dispatch(np.zeros((2, 4)), k.plan(np.zeros((3, 1)), 1)), "x must have"),
        (lambda k: k.combine(np.zeros((2, 4)), k.plan(np.zeros((3, 1)), 1)), "rows must have"),
    ],
)
def test_wrong_arguments(kernels, call, message):
    with pytest.raises(ValueError, match=message):
        call(kernels)

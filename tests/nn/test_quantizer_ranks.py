"""Quantizers on two ranks, each with a part of the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.nn.quantizer_ranks import AVERAGED, REVIVED, averaged, batches

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "nn" / "quantizer_ranks.py")]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", AVERAGED)
def test_moving_averages_are_those_of_the_joined_batch(ranks, kind):
    mine, other = (rank["averaged"][kind] for rank in ranks)
    whole = averaged(AVERAGED[kind])
    for name, value in whole.items():
        assert torch.equal(mine[name], other[name]), name
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", REVIVED)
def test_all_ranks_have_the_same_codes(ranks, kind):
    mine, other = (rank["revived"][kind] for rank in ranks)
    for step, (a, b) in enumerate(zip(mine, other, strict=True)):
        assert a["initialized"]
        for name in ("codebooks", "cluster_size", "embed_sum"):
            if name in a:
                assert torch.equal(a[name], b[name]), (step, name)
        assert a["codebooks"].isfinite().all()


def test_codes_are_replaced_by_vectors_of_both_ranks(ranks):
    x = batches(4)
    for step, of_rank_1 in [(1, 7), (2, 0), (3, 0)]:  # later it has padding only, or nothing
        codebook = ranks[0]["revived"]["all_die"][step]["codebooks"][0]
        same = (codebook[:, None] == x[step]).all(-1)
        assert same[:, :70].any(-1).sum() == 8
        assert same[:, 70:].any(-1).sum() == of_rank_1

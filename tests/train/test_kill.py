"""A run that is killed outright while it saves."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from sparsemoe.data import load_corpora
from sparsemoe.train import checkpoint
from sparsemoe.train.trainer import Trainer
from tests.tiny_lm import tiny_run, write_files

SCRIPT = """
    import sys, time
    from pathlib import Path
    from sparsemoe.data import load_corpora
    from sparsemoe.train import checkpoint
    from sparsemoe.train.trainer import Trainer
    from tests.tiny_lm import tiny_run

    folder, stop_at = Path(sys.argv[1]), int(sys.argv[2])
    flush, calls = checkpoint._flush, 0

    def stall(path):
        global calls
        calls += 1
        if calls == stop_at:
            print("saving", flush=True)
            time.sleep(600)
        flush(path)

    checkpoint._flush = stall
    corpora = load_corpora([folder / "data"])
    Trainer(tiny_run(steps=6, save_every=2), *corpora, folder / "run").fit()
"""
FLUSHES = 5  # a checkpoint's: two files, the index, the folder, and its parent after the rename


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("at", [1, FLUSHES], ids=["first file", "just renamed"])
def test_kill_while_saving_loses_only_steps(tmp_path, at):
    write_files(tmp_path / "data")
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path), str(FLUSHES + at)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout.readline() == "saving\n"  # the second checkpoint, of step 4
    finally:
        process.kill()
        process.wait()

    saved = checkpoint.newest(tmp_path / "run/checkpoints")
    assert saved.step == (4 if at == FLUSHES else 2)
    corpora = load_corpora([tmp_path / "data"])
    resumed = Trainer(tiny_run(steps=6, save_every=2), *corpora, tmp_path / "run")
    resumed.resume(saved)
    resumed.fit()
    whole = Trainer(tiny_run(steps=6), *corpora)
    whole.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000006"]

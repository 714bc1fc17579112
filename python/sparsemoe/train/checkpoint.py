"""Checkpoints that are either whole or not there.

A checkpoint is a folder ``step-00001000`` of safetensors files and a ``checkpoint.json`` that
lists their sizes and hashes. It is written under a temporary name, flushed to the disk and
then renamed, so a run that is killed at any moment leaves the previous one intact.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "checkpoint.json"
FORMAT = 1
TEMPORARY = ".writing-"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, cut short or damaged; one sentence naming the file."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk: its folder and what its index says."""

    path: Path
    step: int
    info: dict[str, Any]
    files: dict[str, dict[str, Any]]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``<name>.safetensors``, on the CPU. Raises CheckpointError."""
        file = self.path / f"{name}.safetensors"
        expected = self.files.get(file.name)
        if expected is None or not file.exists():
            raise CheckpointError(f"checkpoint file {file} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"checkpoint file {file} is damaged: it has {size} bytes, not {expected['bytes']}"
            )
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"checkpoint file {file} is damaged: its contents have changed")
        try:
            return load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"checkpoint file {file} is damaged: {error}") from None


def save(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    info: Mapping[str, Any],
    keep: int = 1,
) -> Path:
    """Writes ``folder/step-<step>`` and removes all but the newest ``keep`` checkpoints.

    tensors  file stem -> tensors by name;  info  whatever JSON can hold

    Raises CheckpointError where there is a checkpoint of this step already.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)
    final = folder / f"step-{step:08d}"
    if final.exists():
        raise CheckpointError(f"checkpoint {final} exists already")
    writing = folder / f"{TEMPORARY}{final.name}"
    writing.mkdir()
    files = {}
    for stem, group in tensors.items():
        file = writing / f"{stem}.safetensors"
        save_file({name: t.detach().cpu().contiguous() for name, t in group.items()}, file)
        _flush(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    index = {"format": FORMAT, "step": step, "files": files, "info": info}
    (writing / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    _flush(writing / INDEX)
    _flush(writing)
    writing.rename(final)
    _flush(folder)
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def newest(folder: str | Path) -> Checkpoint | None:
    """The complete checkpoint of the highest step in ``folder``, or None."""
    complete = _complete(Path(folder))
    return open_checkpoint(complete[-1]) if complete else None


def find(path: str | Path) -> Checkpoint:
    """The checkpoint at ``path``: a checkpoint's own folder, or the newest one of a run.

    Raises CheckpointError where there is none.
    """
    path = Path(path)
    if (path / INDEX).exists():
        return open_checkpoint(path)
    for folder in (path, path / "checkpoints"):
        if found := newest(folder):
            return found
    raise CheckpointError(f"no complete checkpoint in {path}")


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads the index of a checkpoint's folder. Raises CheckpointError."""
    file = path / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        version = index["format"]
        checkpoint = Checkpoint(path, index["step"], index["info"], index["files"])
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint file {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"checkpoint file {file} is damaged: not a whole index") from None
    if version != FORMAT:
        raise CheckpointError(
            f"checkpoint file {file} is of format {version}; this version reads {FORMAT}"
        )
    return checkpoint


def _complete(folder: Path) -> list[Path]:
    """Checkpoint folders with an index, by step."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted((p for p in found if (p / INDEX).exists()), key=lambda p: int(p.name[5:]))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file's, or a folder's, contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

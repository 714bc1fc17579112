"""Files as one long array of bytes, and which of them are held out."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsemoe.models.moe_lm.config import START

SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
# Of Python's own library: its tests, and one file of manual pages as large as 60 modules.
LIBRARY_EXCLUDE = ("test", "tests", "idle_test", "pydoc_data")


class DataError(ValueError):
    """Nothing usable in the given paths; the message is one sentence for the user."""


@dataclass(frozen=True)
class Corpus:
    """Files laid end to end.

    data    uint8 [N]
    starts  int64 [files], ascending: where each file begins
    names   [files]: each file's name, relative to the path it was found under
    """

    data: np.ndarray
    starts: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return self.data.shape[0]

    def windows(self, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows of ``length`` bytes that begin at ``positions`` [B], wholly inside.

        Returns inputs and targets, int64 [B, length]. A target is a byte of the corpus; its
        input is the byte before it, or START where a file begins.
        """
        where = np.asarray(positions, dtype=np.int64)[:, None] + np.arange(length)
        targets = self.bytes_at(positions, length).astype(np.int64)
        inputs = self.data[where - 1].astype(np.int64)
        nearest = np.searchsorted(self.starts, where, side="right") - 1
        inputs[self.starts[nearest] == where] = START
        return inputs, targets

    def bytes_at(self, positions: np.ndarray, length: int) -> np.ndarray:
        """The ``length`` bytes from each of ``positions`` [B], wholly inside: uint8 [B, length]."""
        return self.data[np.asarray(positions, dtype=np.int64)[:, None] + np.arange(length)]

    def fingerprint(self) -> str:
        """A hash of the files' names and places: whether two corpora are the same files."""
        names = "\n".join(f"{n}\t{s}" for n, s in zip(self.names, self.starts, strict=True))
        return hashlib.sha256(f"{len(self)}\n{names}".encode()).hexdigest()[:16]


def load_standard_library(held_out: float = 0.03, tests: bool = False) -> tuple[Corpus, Corpus]:
    """The training and the held-out corpus of the running Python's own library: the source of
    its modules, and for training with ``tests`` also of their tests, which are twice as long.

    Raises DataError where the library is not installed as files.
    """
    folder = sysconfig.get_path("stdlib")
    files = find_files([folder], (".py",), LIBRARY_EXCLUDE)
    train, held = split_files(list(files), held_out)
    if tests:
        more = find_files([folder], (".py",), ("pydoc_data",))
        train += [name for name in more if name not in files]
        files |= more
    return _read(train, files), _read(held, files)


def find_files(
    paths: Sequence[str | Path], suffixes: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, Path]:
    """Every readable, non-empty file: its name relative to the given path, and where it is.

    Folders are walked in sorted order; hidden entries, links to folders, byte-code and
    installed packages are passed over, and so are folders named in ``exclude``. ``suffixes``
    (such as ".py") apply to what is found in folders, not to files that are named outright.

    Raises DataError where a path does not exist or nothing readable is left.
    """
    if not paths:
        raise DataError("no data path is given; name a file or a folder")
    skipped = SKIPPED_FOLDERS.union(exclude)
    found: dict[str, Path] = {}
    for root in map(Path, paths):
        if not root.exists():
            raise DataError(f"data path {root} does not exist")
        if root.is_file():
            candidates = [root]
        else:
            candidates = []
            for folder, folders, files in os.walk(root):
                folders[:] = sorted(f for f in folders if f not in skipped and f[0] != ".")
                candidates += [
                    Path(folder, f)
                    for f in sorted(files)
                    if f[0] != "." and (not suffixes or f.endswith(tuple(suffixes)))
                ]
        for file in candidates:
            if file.is_file() and os.access(file, os.R_OK) and file.stat().st_size > 0:
                name = file.name if file == root else file.relative_to(root).as_posix()
                if found.setdefault(name, file) != file:  # the same name under two roots
                    found[f"{root.as_posix()}/{name}"] = file
    if not found:
        wanted = f" with a name ending in {', '.join(suffixes)}" if suffixes else ""
        raise DataError(f"no readable, non-empty file{wanted} in {', '.join(map(str, paths))}")
    return found


def split_files(names: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Splits names into training and held-out by a hash of each name.

    A file stays on its side when others come or go. With two files or more, each side gets
    at least one.
    """
    if not 0 < fraction < 1:
        raise DataError(f"held_out is {fraction}; it must be between 0 and 1")

    def rank(name: str) -> float:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64

    ordered = sorted(names, key=rank)
    n = sum(rank(name) < fraction for name in ordered)
    n = min(max(n, 1), len(ordered) - 1)
    held_out = set(ordered[:n])
    return [n for n in names if n not in held_out], [n for n in names if n in held_out]


def load_corpora(
    paths: Sequence[str | Path],
    held_out: float = 0.05,
    suffixes: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[Corpus, Corpus]:
    """The training and the held-out corpus of some files and folders.

    Whole files are held out, chosen by :func:`split_files`. Of a single file, the last
    ``held_out`` part is; that file is mapped, not read, so it may exceed memory.
    """
    files = find_files(paths, suffixes, exclude)
    if len(files) == 1:
        ((name, path),) = files.items()
        data = np.memmap(path, dtype=np.uint8, mode="r")
        split = min(max(1, round(len(data) * (1 - held_out))), len(data) - 1)
        if split < 1:
            raise DataError(f"{path} holds a single byte; there is nothing to train on")
        zero = np.zeros(1, dtype=np.int64)
        return Corpus(data[:split], zero, [name]), Corpus(data[split:], zero, [name])
    train, held = split_files(list(files), held_out)
    return _read(train, files), _read(held, files)


def load_corpus(
    paths: Sequence[str | Path], suffixes: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Corpus:
    """Every file in the given paths as one corpus, nothing held out."""
    files = find_files(paths, suffixes, exclude)
    return _read(list(files), files)


def _read(names: list[str], files: dict[str, Path]) -> Corpus:
    parts = [np.fromfile(files[name], dtype=np.uint8) for name in names]
    sizes = np.array([len(part) for part in parts], dtype=np.int64)
    return Corpus(np.concatenate(parts), np.cumsum(sizes) - sizes, names)

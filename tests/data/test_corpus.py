import os

import numpy as np
import pytest

from sparsemoe.data import (
    DataError,
    find_files,
    load_corpora,
    load_corpus,
    load_standard_library,
    split_files,
)
from tests.tiny_lm import write_files


def test_find_files_takes_what_is_data(tmp_path):
    for name in ("a.py", "sub/b.py", "sub/c.txt", ".git/d.py", "__pycache__/e.py", "tests/f.py"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere")
    assert list(find_files([tmp_path])) == ["a.py", "sub/b.py", "sub/c.txt", "tests/f.py"]
    assert list(find_files([tmp_path], [".py"], ["tests"])) == ["a.py", "sub/b.py"]
    assert list(find_files([tmp_path / "sub/c.txt"], [".py"])) == ["c.txt"]
    assert len(find_files([tmp_path, tmp_path])) == 4
    assert len(find_files([tmp_path / "sub", tmp_path / "tests", tmp_path / "sub"])) == 3


def test_the_same_name_in_two_folders_is_two_files(tmp_path):
    for root in ("one", "two"):
        (tmp_path / root).mkdir()
        (tmp_path / root / "a.py").write_text(root)
    corpus = load_corpus([tmp_path / "one", tmp_path / "two"])
    assert corpus.data.tobytes() == b"onetwo"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "does not exist"),
        ("nothing", "no readable, non-empty file in"),
        ("text", "no readable, non-empty file with a name ending in .py in"),
    ],
)
def test_nothing_readable_is_one_sentence(tmp_path, name, message):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing/empty.py").write_text("")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("x")
    with pytest.raises(DataError, match=message) as caught:
        load_corpora([tmp_path / name], suffixes=[".py"] if name == "text" else [])
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no data path"):
        load_corpora([])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_passed_over(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    (tmp_path / "b").chmod(0)
    assert list(find_files([tmp_path])) == ["a"]


def test_split_is_stable_when_files_come_and_go():
    names = [f"package/module{i}.py" for i in range(2000)]
    train, held_out = split_files(names, 0.05)
    assert sorted(train + held_out) == sorted(names)
    assert 60 <= len(held_out) <= 140
    fewer_train, fewer_held_out = split_files(names[::2], 0.05)
    assert set(fewer_held_out) == set(held_out) & set(names[::2])
    assert set(fewer_train) <= set(train)
    assert set(held_out) <= set(split_files(names, 0.1)[1])


def test_split_is_the_same_on_every_machine():
    names = [f"file{i}" for i in range(40)]
    assert split_files(names, 0.1)[1] == ["file6", "file30"]


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_each_side_gets_a_file(fraction):
    train, held_out = split_files(["a", "b", "c"], fraction)
    assert train and held_out and len(train) + len(held_out) == 3


def test_windows_predict_every_byte_from_the_one_before(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"defg")
    corpus = load_corpus([tmp_path])
    inputs, targets = corpus.windows(np.array([0, 1]), 6)
    assert targets.tolist() == [list(b"abcdef"), list(b"bcdefg")]
    start = 256
    assert inputs.tolist() == [[start, 97, 98, start, 100, 101], [97, 98, start, 100, 101, 102]]


def test_a_single_file_is_split_by_bytes(tmp_path):
    (tmp_path / "one").write_bytes(bytes(range(100)))
    train, held_out = load_corpora([tmp_path / "one"], held_out=0.1)
    assert train.data.tobytes() == bytes(range(90))
    assert held_out.data.tobytes() == bytes(range(90, 100))
    (tmp_path / "one").write_bytes(b"x")
    with pytest.raises(DataError, match="single byte"):
        load_corpora([tmp_path / "one"])


def test_fingerprint_tells_other_files(tmp_path):
    folder = write_files(tmp_path / "data")
    before = load_corpus([folder]).fingerprint()
    assert load_corpus([folder]).fingerprint() == before
    (folder / "new.py").write_text("x")
    assert load_corpus([folder]).fingerprint() != before


def test_standard_library_is_source_without_tests():
    train, held_out = load_standard_library()
    names = train.names + held_out.names
    assert "json/decoder.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not any(part in ("test", "site-packages") for n in names for part in n.split("/"))
    assert len(train) > 5_000_000 > 500_000 > len(held_out) > 50_000


def test_standard_library_with_tests_holds_out_the_same_files():
    train, held_out = load_standard_library()
    more, same = load_standard_library(tests=True)
    assert same.names == held_out.names and bytes(same.data) == bytes(held_out.data)
    assert more.names[: len(train.names)] == train.names
    if len(more.names) == len(train.names):
        pytest.skip("this Python comes without its tests")
    assert any(name.startswith("test/") for name in more.names)

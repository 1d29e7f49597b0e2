"""A cache entry is whole or is not there, whatever happens while it is made."""

import os
import time

import pytest

from serve_app.errors import FetchError
from serve_app.fetch.cache import cache_root, ensure, is_whole


def maker(calls, text="content"):
    def make(folder):
        calls.append(folder)
        (folder / "a.txt").write_text(text)
        (folder / "b.txt").write_text("second")

    return make


@pytest.fixture
def entry(tmp_path):
    return tmp_path / "root" / "entry"


def only_entry_in(root):
    return [path.name for path in root.iterdir()] == ["entry"]


def test_an_entry_is_made_once(entry):
    calls = []
    for _ in range(3):
        assert ensure(entry, maker(calls)) == entry
    assert len(calls) == 1
    assert (entry / "a.txt").read_text() == "content"
    assert only_entry_in(entry.parent)


def test_a_failure_leaves_nothing_behind(entry):
    def make(folder):
        (folder / "a.txt").write_text("half")
        assert not entry.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(entry, make)
    assert list(entry.parent.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_damaged_entry_is_made_anew(entry, damage):
    ensure(entry, maker([]))
    if damage == "truncate":
        (entry / "a.txt").write_text("c")
    else:
        (entry / {"remove": "b.txt", "manifest": "manifest.json"}[damage]).unlink()
    calls = []
    ensure(entry, maker(calls))
    assert len(calls) == 1
    assert is_whole(entry, verify=True)
    assert only_entry_in(entry.parent)


def test_verify_sees_a_change_that_keeps_the_size(entry):
    ensure(entry, maker([]))
    (entry / "a.txt").write_text("cOntent")
    calls = []
    ensure(entry, maker(calls))
    assert calls == []
    ensure(entry, maker(calls), verify=True)
    assert len(calls) == 1
    assert (entry / "a.txt").read_text() == "content"


def test_of_two_makers_the_first_to_finish_wins(entry):
    def slow(folder):
        ensure(entry, maker([], text="quick one"))
        maker([], text="slow one's")(folder)

    ensure(entry, slow)
    assert (entry / "a.txt").read_text() == "quick one"
    assert only_entry_in(entry.parent)


def test_what_a_killed_process_left_is_removed_after_a_day(entry):
    old, new = entry.parent / ".part-old", entry.parent / ".part-new"
    for part in (old, new):
        part.mkdir(parents=True)
        (part / "big").write_text("half")
    os.utime(old, times=(time.time() - 2 * 24 * 3600,) * 2)
    ensure(entry, maker([]))
    assert not old.exists()
    assert new.exists()


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FetchError, match="cannot write to the cache"):
        ensure(tmp_path / "file" / "entry", maker([]))


def test_the_environment_moves_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("OCTAVO_CACHE")
    assert cache_root().name == "octavo"

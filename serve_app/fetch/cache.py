"""The cache folder: entries appear whole or not at all, and a manifest in each says what it must hold."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import platformdirs

from serve_app.errors import FetchError

_MANIFEST = "manifest.json"
_PART_PREFIX = ".part-"
_STALE_S = 24 * 3600.0


def cache_root() -> Path:
    """Where fetched models are kept: `OCTAVO_CACHE`, or the user's cache folder."""
    given = os.environ.get("OCTAVO_CACHE")
    return Path(given).expanduser() if given else platformdirs.user_cache_path("octavo")


def ensure(entry: Path, make: Callable[[Path], None], *, verify: bool = False) -> Path:
    """Return `entry`, made by `make(folder)` if it is not there whole.

    `make` works in a sibling folder that is renamed when done, so that a reader never sees half an entry; of two
    processes that make the same entry, the first to finish wins. `verify` reads every byte of an existing entry.
    Raises FetchError where the cache cannot be written.
    """
    if is_whole(entry, verify=verify):
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_parts(entry.parent)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=_PART_PREFIX) as part:
            made = Path(part) / "new"
            made.mkdir()
            make(made)
            _write_manifest(made)
            if not is_whole(entry, verify=verify):  # else another process has just put one there
                _replace(entry, made, Path(part) / "old")
    except OSError as error:
        raise FetchError(f"cannot write to the cache {entry.parent}: {error.strerror or error}") from error
    return entry


def is_whole(entry: Path, *, verify: bool = False) -> bool:
    """Whether the files of the manifest are there with their sizes and, where `verify`, their SHA-256."""
    try:
        files = json.loads((entry / _MANIFEST).read_bytes())["files"]
        return all(_is_as_listed(entry / name, listed, verify) for name, listed in files.items())
    except (OSError, ValueError, KeyError):
        return False


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_as_listed(path: Path, listed: dict[str, str | int], verify: bool) -> bool:
    return path.stat().st_size == listed["bytes"] and (not verify or sha256(path) == listed["sha256"])


def _write_manifest(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps({"files": files}, indent=2))


def _replace(entry: Path, made: Path, old: Path) -> None:
    """Put `made` in the place of `entry`, and what was there into `old`."""
    with contextlib.suppress(FileNotFoundError):
        entry.rename(old)  # a damaged one; it goes with the temporary folder
    try:
        made.rename(entry)
    except OSError:
        if not is_whole(entry):  # a race was lost: that is as good
            raise


def _remove_stale_parts(root: Path) -> None:
    """A process that was killed left its half behind: gigabytes that nobody would ever look for."""
    for part in root.glob(f"{_PART_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > _STALE_S:
                shutil.rmtree(part)

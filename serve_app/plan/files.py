"""What users name: their files, and entries of the tables that come with the planner. Every fault is a PlanError."""

import difflib
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from serve_app.errors import PlanError

MAX_FILE_BYTES = 64 << 20
_SHOWN_CHARS = 80

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast, where there is one


@cache
def load_table(name: str) -> dict[str, dict[str, Any]]:
    """A table that comes with the planner, entries by their name. Not to be changed: it is read once."""
    content = (resources.files("serve_app.plan") / "data" / f"{name}.yaml").read_bytes()
    table: dict[str, dict[str, Any]] = yaml.load(content, Loader=_Loader)
    return table


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a user's YAML file. PlanError where there is none, or a key is there twice."""
    try:
        value = _construct(read_text(path))
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise PlanError(f"{shown(path)} is not valid YAML{where}: {one_line(error.problem or error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise PlanError(f"{shown(path)} is not valid YAML: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise PlanError(f"{shown(path)} must hold a YAML mapping, not {shown(value)}")
    return value


def _construct(text: str) -> object:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _refuse_twice(node, set())
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_twice(node: yaml.Node | None, seen: set[int]) -> None:
    """YAML's own loaders let the last of two equal keys win. Raises MarkedYAMLError."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    names = set()
    for child in node.value:
        for part in child if isinstance(child, tuple) else (child,):
            _refuse_twice(part, seen)
        if isinstance(child, tuple) and isinstance(child[0], yaml.ScalarNode):
            if child[0].value in names:
                raise yaml.MarkedYAMLError(None, None, f"{child[0].value} is there twice", child[0].start_mark)
            names.add(child[0].value)


def find_path(text: str) -> Path | None:
    """The file or folder of that name; None where there is none, or where no file can have such a name."""
    if not text.strip():
        return None
    try:
        path = Path(text)
        path.stat()
    except (OSError, ValueError, RuntimeError):  # ValueError: a NUL, or what no file system can spell
        return None
    return path


def read_text(path: Path) -> str:
    """A whole text file. PlanError where it is none, is too large or cannot be read."""
    try:
        if not path.is_file():
            raise PlanError(f"{shown(path)} is not a file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise PlanError(f"{shown(path)} has {path.stat().st_size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PlanError(f"{shown(path)} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PlanError(f"{shown(path)} is not a text in UTF-8") from None


def unknown(kind: str, text: str, known: Iterable[str], *, files: str) -> PlanError:
    """What to say of a name that is neither in a table nor on the disk. `files` says what might have been there."""
    near = difflib.get_close_matches(text[:_SHOWN_CHARS].casefold(), list(known), n=3, cutoff=0.5)
    hint = f"; near it are {', '.join(near)}" if near else ""
    return PlanError(f"{kind} {shown(text)} is neither a known name nor {files}{hint} (`octavo plan --list` names all)")


def shown(value: object) -> str:
    """As a literal, cut to what a sentence can hold."""
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def one_line(error: object) -> str:
    """The words of another's error, in one line without a full stop. Of a long one, the middle is left out."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 4 * _SHOWN_CHARS else f"{text[: 2 * _SHOWN_CHARS]} ... {text[-_SHOWN_CHARS:]}"

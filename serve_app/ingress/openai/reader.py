"""An answer's text as it comes, told apart into what is said and which tools are called.

A reader goes character by character: what it has told after a text does not depend on how the text was cut. So a
stream that is resumed goes on with the very deltas that are missing.
"""

import json
import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol

import msgspec


@dataclass(frozen=True)
class Said:
    text: str


@dataclass(frozen=True)
class Called:
    """Call `index` begins or, where `name` is None, goes on: `arguments` is the next piece of its JSON."""

    index: int
    name: str | None
    arguments: str


Delta = Said | Called


class Reader(Protocol):
    @property
    def num_calls(self) -> int: ...

    def push(self, text: str) -> list[Delta]:
        """What is certain now and was not before."""
        ...

    def finish(self) -> list[Delta]:
        """What was held back, as it stands, when no more text comes."""
        ...


class PlainReader:
    """Everything is said."""

    num_calls = 0

    def push(self, text: str) -> list[Delta]:
        return [Said(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


@dataclass(frozen=True)
class CallStyle:
    """How a model writes its calls: as JSON objects with a name and arguments, between marks."""

    opening: str  # empty: the answer itself begins with a call, or has none
    closing: str = ""  # empty: calls go on to the end of the answer
    between: str = " \n\r\t"  # what may stand around the objects
    skip_special_tokens: bool = True  # False where the marks are special tokens


HERMES = CallStyle("<tool_call>", "</tool_call>")
MISTRAL = CallStyle("[TOOL_CALLS]", between=" \n\r\t[,]", skip_special_tokens=False)
LLAMA = CallStyle("", between=" \n\r\t;")
FORCED = CallStyle("")  # what the grammar of a forced call makes


def style_of(template: str) -> CallStyle | None:
    """How the model of this chat template calls tools; None where it does not, or in a way that is not read here."""
    if "tools" not in template:
        return None
    if "<tool_call>" in template:
        return None if "<function=" in template else HERMES  # the latter is XML
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else MISTRAL
    return LLAMA if "<|python_tag|>" in template or '"parameters"' in template else None


class _State(Enum):
    OUTSIDE = auto()  # before an opening mark
    BETWEEN = auto()  # behind it, before an object or the closing mark
    INSIDE = auto()  # an object
    PLAIN = auto()  # no call comes any more


class CallReader:
    """Finds calls in the text of an answer.

    What looked like a call and is none is said as it was written, with all that stands after it.
    """

    def __init__(self, style: CallStyle, max_calls: int | None = None) -> None:
        self.num_calls = 0  # that were told
        self._style = style
        self._max_calls = max_calls
        self._state = _State.OUTSIDE if style.opening else _State.BETWEEN
        self._mark = ""  # what may be the beginning of a mark
        self._passed = ""  # what is said after all if no call follows it
        self._space = ""  # behind a call: it is said only if more is
        self._object = _Object()
        self._deltas: list[Delta] = []

    def push(self, text: str) -> list[Delta]:
        for i, char in enumerate(text):
            if self._state is _State.PLAIN:
                self._say(text[i:])
                break
            self._step(char)
        return self._told()

    def finish(self) -> list[Delta]:
        rest = self._passed + self._mark + self._object.untold
        if not self.num_calls or rest.strip(self._style.between):
            self._say(rest)
        self._passed, self._mark, self._object = "", "", _Object()
        return self._told()

    def _told(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _step(self, char: str) -> None:
        match self._state:
            case _State.OUTSIDE:
                self._outside(char)
            case _State.BETWEEN:
                self._between(char)
            case _State.INSIDE:
                self._inside(char)

    def _outside(self, char: str) -> None:
        self._mark += char
        while not self._style.opening.startswith(self._mark):
            self._say(self._mark[0])
            self._mark = self._mark[1:]
        if self._mark == self._style.opening:
            self._passed, self._mark, self._state = self._mark, "", _State.BETWEEN

    def _between(self, char: str) -> None:
        if not self._mark and char in self._style.between:
            self._passed += char
            return
        if not self._mark and char == "{":
            self._object, self._state = _Object(), _State.INSIDE
            self._inside(char)
            return
        self._mark += char
        closing = self._style.closing
        if closing and self._mark == closing:
            self._passed, self._mark, self._state = "", "", _State.OUTSIDE
        elif not closing.startswith(self._mark):
            self._give_up(self._mark)

    def _inside(self, char: str) -> None:
        call = self._object
        name, arguments = call.push(char)
        if name is not None:
            self.num_calls += 1
            self._passed = ""
        if name is not None or arguments:
            self._call(self.num_calls - 1, name, arguments)
        if not call.is_whole:
            return
        self._object, self._state = _Object(), _State.BETWEEN
        if not call.is_call:
            self._give_up(call.untold)

    def _give_up(self, text: str) -> None:
        passed, self._passed, self._mark, self._state = self._passed, "", "", _State.PLAIN
        self._say(passed + text)

    def _say(self, text: str) -> None:
        if self.num_calls and text.isspace():
            self._space += text
            return
        if not text:
            return
        text, self._space = self._space + text, ""
        last = self._deltas[-1] if self._deltas else None
        if isinstance(last, Said):
            self._deltas[-1] = Said(last.text + text)
        else:
            self._deltas.append(Said(text))

    def _call(self, index: int, name: str | None, arguments: str) -> None:
        if self._max_calls is not None and index >= self._max_calls:
            return
        last = self._deltas[-1] if self._deltas else None
        if name is None and isinstance(last, Called) and last.index == index:
            self._deltas[-1] = Called(index, last.name, last.arguments + arguments)
        else:
            self._deltas.append(Called(index, name, arguments))


_HEAD = re.compile(r'\{\s*"name"\s*:\s*(?P<name>"[^"\\]*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')


class _Object:
    """A JSON object as it comes. Where it begins with the name, its arguments are told as they come too."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._tells = False  # the arguments, as they come
        self.is_call = False
        self.is_whole = False

    @property
    def untold(self) -> str:
        """Its text, as long as it is not known to be a call."""
        return "" if self.is_call else "".join(self._text)

    def push(self, char: str) -> tuple[str | None, str]:
        """The name, as soon as it is certain, and the next piece of the arguments."""
        self._text.append(char)
        depth = self._depth
        self._track(char)
        self.is_whole = self._depth == 0
        if self.is_call:
            told = char if self._tells else ""
            self._tells = self._tells and self._depth > 1
            return None, told
        if char == "{" and (depth, self._depth) == (1, 2):
            return self._begin()
        return self._whole() if self.is_whole else (None, "")

    def _track(self, char: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string = True
        else:
            self._depth += (char in "{[") - (char in "}]")

    def _begin(self) -> tuple[str | None, str]:
        head = _HEAD.fullmatch("".join(self._text[:-1]))
        name = None if head is None else _json(head["name"])
        if not isinstance(name, str):
            return None, ""
        self.is_call = self._tells = True
        self._text.clear()
        return name, "{"

    def _whole(self) -> tuple[str | None, str]:
        call = _json("".join(self._text))
        name = call.get("name") if isinstance(call, dict) else None
        arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
        if not isinstance(name, str) or not isinstance(arguments, dict | str):
            return None, ""
        self.is_call = True
        return name, arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()


def _json(text: str) -> Any:
    """None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None

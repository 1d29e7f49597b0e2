"""HTML by small functions. Text is escaped on its way into a tag, so that nothing that a user named can be markup."""

import re
from collections.abc import Iterable, Sequence
from html import escape

_EMPTY = frozenset({"meta", "input", "br"})
_ENDS_LINE = re.compile(
    "body|details|div|figure|h[1-4]|head|header|html|input|li|main|meta|nav|p|section|style|summary|svg|table|tbody"
    "|thead|title|tr|ul"
)
_UNSEEN = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127, *range(0xD800, 0xE000)), "\ufffd")


class Html(str):
    """What is markup already."""

    __slots__ = ()


Attribute = str | int | float | bool | None


def text(value: str) -> Html:
    """Escaped, unless it is markup. Control characters, and what UTF-8 cannot say, are shown as such."""
    return value if isinstance(value, Html) else Html(escape(value.translate(_UNSEEN)))


def join(parts: Iterable[str], between: str = "") -> Html:
    return Html(text(between).join(map(text, parts)))


def tag(name: str, /, *children: str, **attributes: Attribute) -> Html:
    """`class_` is class, `stroke_width` is stroke-width; None and False are left out, True has no value."""
    opened = f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items())}>"
    closed = "" if name in _EMPTY else f"</{name}>"
    return Html(f"{opened}{join(children)}{closed}" + ("\n" if _ENDS_LINE.fullmatch(name) else ""))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    shown = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f' {name}="{text(str(shown))}"'


def section(anchor: str, title: str, *children: str) -> Html:
    return tag("section", tag("h2", title), *children, id=anchor)


def items(parts: Iterable[str], **attributes: Attribute) -> Html:
    return tag("ul", *(tag("li", part) for part in parts), **attributes)


def table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = (), wide: bool = True
) -> Html:
    """The first cell of a row is its header. `numbers`: columns that are set to the right. `wide`: it may scroll."""
    right = frozenset(numbers)

    def cell(name: str, index: int, content: str, scope: str | None = None) -> Html:
        return tag(name, content, scope=scope, class_="number" if index in right else None)

    head = tag("tr", *(cell("th", i, content, "col") for i, content in enumerate(heads)))
    body = (
        tag("tr", *(cell("td" if i else "th", i, part, None if i else "row") for i, part in enumerate(row)))
        for row in rows
    )
    made = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    if not wide:
        return made
    return tag("div", made, class_="scroll", tabindex=0, role="region", aria_label=caption)


def bar(start: float, share: float, kind: str) -> Html:
    """A bar in its track: where it begins and how long it is, as shares of the whole (0..1)."""
    left, width = 100 * min(1.0, max(0.0, start)), 100 * min(1.0, max(0.0, share))
    return tag("span", tag("i", class_=kind, style=f"left:{left:.3f}%;width:{width:.3f}%"), class_="track")

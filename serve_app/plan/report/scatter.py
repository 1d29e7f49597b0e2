"""A plot of points on two axes as inline SVG, with its labels where they hide least."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from serve_app.plan.report.figures import number
from serve_app.plan.report.markup import Attribute, Html, join, tag

LOG_FROM = 20.0  # largest over smallest, from which an axis is logarithmic
LETTER = 6.9  # pixels of a letter of 12 pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 16, 48  # margins


@dataclass(frozen=True)
class Axis:
    """`low` to `high`, both shown; `ticks` between them."""

    label: str
    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis(label: str, values: Iterable[float], most_ticks: int = 8) -> Axis:
    """For values that are finite and above 0."""
    found = sorted(values) or [1.0]
    low, high = found[0], found[-1]
    if low > 0 and high / low > LOG_FROM:
        low, high = low / 1.3, high * 1.3
        return Axis(label, low, high, True, tuple(_log_ticks(low, high, most_ticks)))
    room = (high - low) * 0.06 or 0.1 * high or 1.0
    low, high = (0.0 if low < high / 2 else low - room), high + room
    return Axis(label, low, high, False, tuple(_ticks(low, high, most_ticks)))


def _ticks(low: float, high: float, most: int) -> Iterator[float]:
    """Multiples of 1, 2 or 5."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    for index in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield index * step


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """1, 2, 5 of each power of ten, or those of fewer."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) <= most:
            break
    return found


@dataclass(frozen=True)
class Point:
    """`label`: is written beside it. `kind`: CSS classes. `title`: what it is, in words."""

    x: float
    y: float
    radius: float
    kind: str
    title: str
    label: str = ""


@dataclass(frozen=True)
class Limit:
    """A line across, at a value of x."""

    x: float
    label: str


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """Of area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


@dataclass(frozen=True)
class Scatter:
    """`name`: of this drawing of it, for its ids. Sizes in pixels of its own, which are the page's at full width."""

    name: str
    title: str
    description: str
    x: Axis
    y: Axis
    points: Sequence[Point]
    limit: Limit | None
    width: int
    height: int

    def svg(self) -> Html:
        return tag(
            "svg",
            tag("title", self.title, id=f"{self.name}-title"),
            tag("desc", self.description, id=f"{self.name}-desc"),
            *self._grid(),
            *self._limit(),
            *(self._mark(point) for point in self.points),
            *self._labels(),
            viewBox=f"0 0 {self.width} {self.height}",
            role="img",
            aria_labelledby=f"{self.name}-title {self.name}-desc",
            class_=f"plot {self.name}",
        )

    def _x(self, value: float) -> float:
        return LEFT + self.x.at(value) * (self.width - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        return self.height - BOTTOM - self.y.at(value) * (self.height - TOP - BOTTOM)

    def _grid(self) -> Iterator[Html]:
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        for value in self.x.ticks:
            x = self._x(value)
            yield tag("line", x1=x, y1=TOP, x2=x, y2=bottom, class_="grid")
            yield tag("text", number(value), x=x, y=bottom + 17, text_anchor="middle")
        for value in self.y.ticks:
            y = self._y(value)
            yield tag("line", x1=LEFT, y1=y, x2=right, y2=y, class_="grid")
            yield tag("text", number(value), x=LEFT - 7, y=y + 4, text_anchor="end")
        middle = (TOP + bottom) / 2
        yield tag("text", self.x.label, x=(LEFT + right) / 2, y=self.height - 8, text_anchor="middle", class_="axis")
        turn = f"rotate(-90 14 {middle:.6g})"
        yield tag("text", self.y.label, x=14, y=middle, text_anchor="middle", class_="axis", transform=turn)

    def _limit(self) -> Iterator[Html]:
        """Where it is in the picture."""
        if self.limit is None or not self.x.low <= self.limit.x <= self.x.high:
            return
        x = self._x(self.limit.x)
        yield tag("line", x1=x, y1=TOP, x2=x, y2=self.height - BOTTOM, class_="limit")
        is_right = x > self.width / 2
        where: dict[str, Attribute] = {"x": x - 5 if is_right else x + 5, "text_anchor": "end" if is_right else "start"}
        yield tag("text", self.limit.label, y=self.height - BOTTOM - 6, class_="limit", **where)

    def _mark(self, point: Point) -> Html:
        where: dict[str, Attribute] = {"cx": self._x(point.x), "cy": self._y(point.y), "r": point.radius}
        return tag("circle", tag("title", point.title), class_=f"mark {point.kind}", **where)

    # -- labels -----------------------------------------------------------------------------------------------------

    def _labels(self) -> Iterator[Html]:
        marks = [self._box(point) for point in self.points]
        taken: list[Box] = []
        for point in self.points:
            if point.label:
                place = min(self._places(point), key=lambda box: self._hides(box, marks, taken))
                taken.append(place)
                yield self._label(point, place)

    def _box(self, point: Point) -> Box:
        x, y, radius = self._x(point.x), self._y(point.y), point.radius
        return Box(x - radius, y - radius, x + radius, y + radius)

    def _places(self, point: Point) -> Iterator[Box]:
        """Around it, near ones first."""
        x, y = self._x(point.x), self._y(point.y)
        width = LETTER * len(point.label)
        for away in (point.radius + 6, point.radius + 24, point.radius + 48, point.radius + 80):
            for down in (-away - 14, away, -7.0):
                for left in (x - width / 2, x + away, x - away - width):
                    if not (down == -7.0 and left == x - width / 2):
                        yield Box(left, y + down, left + width, y + down + 14)

    def _hides(self, box: Box, marks: Sequence[Box], taken: Sequence[Box]) -> float:
        """Least is best: other labels count most, and what lies outside."""
        inside = box.overlap(Box(LEFT, TOP, self.width - 2, self.height - BOTTOM))
        outside = (box.right - box.left) * (box.bottom - box.top) - inside
        wide = Box(box.left - 2, box.top - 2, box.right + 2, box.bottom + 2)
        return 10 * outside + 5 * sum(map(wide.overlap, taken)) + sum(map(wide.overlap, marks))

    def _label(self, point: Point, box: Box) -> Html:
        x, y = self._x(point.x), self._y(point.y)
        to_x = min(max(x, box.left), box.right)
        to_y = box.bottom if box.bottom < y else box.top if box.top > y else (box.top + box.bottom) / 2
        away = math.hypot(to_x - x, to_y - y) or 1.0
        near_x, near_y = x + (to_x - x) * point.radius / away, y + (to_y - y) * point.radius / away
        return join(
            [
                tag("line", x1=near_x, y1=near_y, x2=to_x, y2=to_y, class_="leader"),
                tag("text", point.label, x=box.left, y=box.bottom - 3, class_=f"label {point.kind}"),
            ]
        )


def spread(values: Iterable[int], most: int) -> list[int]:
    """A few of them, evenly chosen, both ends among them."""
    found = sorted(set(values))
    if len(found) <= most:
        return found
    picked = [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]
    return [picked[0], *(after for before, after in pairwise(picked) if after != before)]

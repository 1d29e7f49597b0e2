"""Which of several answers are beaten by no other in everything that counts."""

from collections.abc import Sequence


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices, in order, of the points that no other dominates. Less is better on each axis.

    A point dominates another that is nowhere better and somewhere worse; of equal points all stay. Each is compared
    with the front that was found before it only: in lexicographic order nothing later dominates it.
    """
    found: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: tuple(points[index])):
        if not any(_dominates(points[other], points[index]) for other in reversed(found)):
            found.append(index)
    return sorted(found)


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    is_better = False
    for mine, its in zip(one, other, strict=True):
        if mine > its:
            return False
        is_better = is_better or mine < its
    return is_better

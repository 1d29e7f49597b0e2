"""Figures and lists in few characters."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby

from serve_app.experts.placement import Pair

_MIB = 1 << 20
_GIB = 1 << 30


def memory(num_bytes: int) -> str:
    """In MiB or GiB, at most four characters up to 999 GiB: 912M, 3.2G, 38G; "-" where nothing is known."""
    if num_bytes == 0:
        return "-"
    if num_bytes < 999.5 * _MIB:
        return f"{num_bytes / _MIB:.0f}M"
    return f"{num_bytes / _GIB:.1f}G" if num_bytes < 9.95 * _GIB else f"{num_bytes / _GIB:.0f}G"


def times(ratio: float) -> str:
    """At most five characters up to 999: 1.42x, 12.3x, 128x."""
    num_decimals = 2 if ratio < 9.995 else 1 if ratio < 99.95 else 0
    return f"{ratio:.{num_decimals}f}x"


def short(number: int) -> str:
    """At most five characters: 9999, 12.3k, 1.2M."""
    if number < 10_000:
        return str(number)
    for unit, size in (("k", 10**3), ("M", 10**6), ("G", 10**9)):
        if number < 999.5 * size:
            return f"{number / size:.1f}{unit}" if number < 99.95 * size else f"{number / size:.0f}{unit}"
    return f"{number / 10**12:.0f}T"


def count(number: int, what: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def layers(first: int, end: int) -> str:
    """The half-open interval as `layer 0` or `layers 0-3`."""
    return f"layer {first}" if end - first == 1 else f"layers {first}-{end - 1}"


def ranges(numbers: Iterable[int]) -> str:
    """In order, three or more in a row as first-last: `0-3,7,9,10`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def held(pairs: Iterable[Pair]) -> str:
    """`L0-2:1,9  L3:4`: layers and the experts of each, layers with the same experts taken together."""
    layers_by_experts: defaultdict[str, list[int]] = defaultdict(list)
    for layer, of_layer in groupby(sorted(pairs), lambda pair: pair[0]):
        layers_by_experts[ranges(expert for _, expert in of_layer)].append(layer)
    return "  ".join(f"L{ranges(in_layers)}:{experts}" for experts, in_layers in layers_by_experts.items())


def plain(text: str) -> str:
    """`text` without the characters that steer a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)

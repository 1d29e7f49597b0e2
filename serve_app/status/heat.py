"""Load as a bar: its length and its colour say the same."""

from rich.text import Text

FULL_RATIO = 2.0  # over the mean; a full bar is this or more
EIGHTHS = " ▏▎▍▌▋▊▉"
STYLES = ((0.75, "cyan"), (1.25, "green"), (1.5, "yellow"))  # for a ratio below; "red" from there on


def style_of(ratio: float) -> str:
    """The colour of a worker that has `ratio` times its stage's mean load."""
    return next((style for limit, style in STYLES if ratio < limit), "red")


def heat_bar(ratio: float, width: int, *, ascii_only: bool = False) -> Text:
    """Exactly `width` characters, half of them filled at the mean. A load that is not zero is never drawn as none."""
    share = min(ratio / FULL_RATIO, 1.0)
    if ascii_only:
        num_full = min(width, round(share * width))
        bar = "#" * num_full + "." * (width - num_full)
    else:
        num_eighths = max(round(share * width * 8), ratio > 0)
        num_full, rest = divmod(num_eighths, 8)
        bar = ("█" * num_full + EIGHTHS[rest]).ljust(width)[:width]
    return Text(bar, style_of(ratio))

"""Which experts the tokens of a step go to, where the router spreads them evenly: means, and the busiest worker.

A layer is done when its busiest worker is, so it is that one's rows and reads that a step takes as long as.
"""

import math
from functools import lru_cache

# Mean of the largest of g independent normal values, in standard deviations (Harter, doi 10.1093/biomet/48.1-2.151).
_LARGEST = {1: 0.0, 2: 0.564, 3: 0.846, 4: 1.029, 5: 1.163, 6: 1.267, 7: 1.352, 8: 1.424, 10: 1.539, 12: 1.629}
_LARGEST |= {16: 1.766, 24: 1.948, 32: 2.070, 48: 2.232, 64: 2.343, 128: 2.594, 256: 2.822}


def distinct_experts(num_experts: float, top_k: float, all_experts: float, num_tokens: float) -> float:
    """How many of `num_experts` out of `all_experts` are touched by so many tokens: E (1 - (1 - k/E)^n), of uniform
    routing. Above zero for any number of tokens."""
    missed: float = (1.0 - min(1.0, top_k / all_experts)) ** num_tokens
    return num_experts * (1.0 - missed)


@lru_cache
def _largest(num_values: int) -> float:
    return _LARGEST[max(known for known in _LARGEST if known <= num_values)]


def expert_imbalance(group_size: int, num_rows: float) -> float:
    """Rows of the busiest of `group_size` workers over their mean, where `num_rows` are routed uniformly at random."""
    if group_size == 1 or num_rows <= 0:
        return 1.0
    return min(float(group_size), 1.0 + _largest(group_size) * math.sqrt((group_size - 1) / num_rows))


def busiest_touched(touched: float, num_experts: int, group_size: int) -> float:
    """Experts that the busiest of `group_size` workers reads where `touched` of `num_experts` are, in the mean.

    Each worker's number is hypergeometric. Never below one where one is touched: somebody reads it.
    """
    num_hosts = min(group_size, num_experts)
    if num_hosts == 1:
        return touched
    held = -(-num_experts // group_size)
    share = held / num_experts
    variance = touched * share * (1 - share) * max(0.0, num_experts - touched) / (num_experts - 1)
    most = share * touched + _largest(num_hosts) * math.sqrt(variance)
    return min(max(most, min(1.0, touched)), touched, float(held))

"""Where the time of a step goes."""

import time
from typing import Literal, get_args

Part = Literal["attention", "experts", "head", "shards", "other"]


class StepTimer:
    """Seconds that went to each part of the steps, for whoever passes one to a stage."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seconds: dict[Part, float] = dict.fromkeys(get_args(Part), 0.0)
        self.start()

    def start(self) -> None:
        self._since_s = time.perf_counter()

    def lap(self, part: Part) -> None:
        """Book the time since the last lap to `part`."""
        now_s = time.perf_counter()
        self.seconds[part] += now_s - self._since_s
        self._since_s = now_s

"""What a newcomer would meet on a replica: when its first token would come, and who would be late for it.

Pure arithmetic over the queues of a scheduler and the pace of its steps; nothing is changed.
"""

from heapq import heapify, heappop, heappush

from serve_app.engine.pace import Pace, Work
from serve_app.engine.scheduler import MIN_CHUNK_TOKENS, Scheduler
from serve_app.engine.sequence import Sequence
from serve_app.engine.slo import Forecast


def foresee(scheduler: Scheduler, seq: Sequence, pace: Pace, now: float, bias: float = 1.0) -> Forecast:
    """When `seq` would have its first token here, and whether somebody would be late for it. O(queue).

    Steps end one after the other: those in flight, then as many as it takes to compute the prompts before it and
    its own, beside the tokens of those who run by then. It also needs a place and pages: those who run give theirs
    back when they end. `bias`: how much longer all takes than the pace says.
    """
    walk = _Walk(scheduler, pace)
    behind: list[Sequence] = []
    deadline_s, arrival = seq.order
    for other in scheduler.waiting.values():  # in order
        if behind or other.deadline_s > deadline_s or (other.deadline_s == deadline_s and other.arrival > arrival):
            behind.append(other)
        else:
            walk.take(other)
    walk.find_place(seq)
    wait_s = walk.time_s
    num_cached = scheduler.hit_tokens(seq)
    own_s, cost_s = walk.own_s(seq, num_cached), walk.cost_s(seq, num_cached)
    harms = bool(behind) and _harms(walk, seq, behind, now, bias)
    return Forecast(scheduler.replica, wait_s, own_s, cost_s, harms, scheduler.load_tokens)


def wait_s(scheduler: Scheduler, pace: Pace) -> float:
    """Until the computation of a newcomer would begin that comes after all others."""
    walk = _Walk(scheduler, pace)
    for other in scheduler.waiting.values():
        walk.take(other)
    return walk.time_s


def prompt_tokens(scheduler: Scheduler, tenant: str = "") -> tuple[int, int]:
    """Tokens of prompts that are yet to be computed: those of one tenant, and of all. O(queue)."""
    own = total = 0
    for queue in (scheduler.prefilling, scheduler.waiting):
        for seq in queue.values():
            num = len(seq.tokens) - seq.num_sent
            total += num
            if seq.request.terms.tenant == tenant:
                own += num
    return own, total


class _Walk:
    """Along the queue of a replica: at which step, counted from now, each has its turn.

    A prompt takes its part of the steps' token budget, and each step costs what it costs without prompts; what
    prompt tokens cost is added up beside that. Answers end after what is learned of their lengths.
    """

    def __init__(self, scheduler: Scheduler, pace: Pace) -> None:
        """The prompts that were begun are done first, whatever their deadlines."""
        config = scheduler.config
        flying = scheduler.flying()
        self._num_fill = max(0, config.num_stages - 1 - len(flying))
        self._flying_s = sum(pace.step_s(work) for work in flying)
        self._answer_steps = scheduler.length_ratio * config.num_stages
        self._page_tokens, self._num_stages = config.page_tokens, config.num_stages
        self._set_costs(scheduler, pace)
        self._steps = 0.0
        self._extra_s = 0.0
        self._num_places = config.max_running - len(scheduler.running)
        self._max_running = config.max_running
        self._num_pages = scheduler.pool.num_available - len(scheduler.running)
        prefilling = scheduler.prefilling
        self._ends = [
            (self._answer_steps * (seq.limit_tokens - len(seq.tokens)), len(seq.pages))
            for rid, seq in scheduler.running.items()
            if rid not in prefilling
        ]
        heapify(self._ends)
        for seq in prefilling.values():
            self._compute(seq, seq.num_sent, len(seq.pages))

    def _set_costs(self, scheduler: Scheduler, pace: Pace) -> None:
        config, waiting = scheduler.config, scheduler.waiting
        num_decoding = len(scheduler.running) - len(scheduler.prefilling)
        num_meanwhile = num_decoding + (len(scheduler.prefilling) + len(waiting)) / 2
        rows = min(config.max_running, num_meanwhile) / config.num_stages
        num_attended = sum(seq.num_done for seq in scheduler.running.values()) / max(1, len(scheduler.running))
        self._step_s = pace.step_s(Work(0.0, rows, rows * num_attended / 1e3))
        _, self._token_s, _, self._kpair_s = pace.costs or (0.0, 0.0, 0.0, 0.0)
        self._budget = max(1.0, min(scheduler.gentle_tokens(pace, int(rows)), config.max_step_tokens - rows))

    @property
    def time_s(self) -> float:
        """When the next one has its turn."""
        return self._flying_s + self._steps * self._step_s + self._extra_s

    def take(self, seq: Sequence) -> None:
        """A waiting one has its turn."""
        num_pages = -(-len(seq.tokens) // self._page_tokens)
        if self._num_places <= 0 or self._num_pages < num_pages:
            self._free(num_pages)
        self._num_places -= 1
        self._num_pages -= num_pages + 1
        self._compute(seq, 0, num_pages)

    def find_place(self, seq: Sequence) -> None:
        """Wait until `seq` could have its turn."""
        self._free(-(-len(seq.tokens) // self._page_tokens))

    def _free(self, num_pages: int) -> None:
        """Wait until enough of those who run have ended."""
        while self._ends and (self._num_places <= 0 or self._num_pages < num_pages):
            end, freed = heappop(self._ends)
            self._steps = max(self._steps, end)
            self._num_places += 1
            self._num_pages += freed + 1

    def _compute(self, seq: Sequence, num_done: int, num_pages: int) -> None:
        num_tokens = len(seq.tokens)
        num_left = num_tokens - num_done
        self._steps += num_left / self._budget
        self._extra_s += num_left * (self._token_s + self._kpair_s * (num_tokens + num_done) / 2e3)
        answer = self._answer_steps * (seq.limit_tokens - num_tokens)
        heappush(self._ends, (self._steps + self._num_stages - 1 + answer, num_pages))

    def cost_s(self, seq: Sequence, num_cached: int) -> float:
        """By how much later all have their turn who come after it, where prompts or places are what is short."""
        answer_steps = self._answer_steps * (seq.limit_tokens - len(seq.tokens)) / self._max_running
        steps = max((len(seq.tokens) - num_cached) / self._budget, answer_steps)
        return steps * self._step_s + self._prompt_s(len(seq.tokens), num_cached)

    def _prompt_s(self, num_tokens: int, num_done: int) -> float:
        """Of a prompt's tokens alone, without the steps that carry them."""
        return (num_tokens - num_done) * (self._token_s + self._kpair_s * (num_tokens + num_done) / 2e3)

    def own_s(self, seq: Sequence, num_cached: int) -> float:
        """From its turn to its first token. An idle pipeline has to be filled first."""
        num_left = len(seq.tokens) - num_cached
        extra_s = self._prompt_s(len(seq.tokens), num_cached)
        took_s = max(1.0, num_left / self._budget) * self._step_s + extra_s
        if not self._num_fill:
            return took_s
        chunk = min(self._budget, max(MIN_CHUNK_TOKENS, num_left / self._num_stages))
        return took_s + self._num_fill * (self._step_s + extra_s * min(1.0, chunk / num_left))


def _harms(walk: _Walk, seq: Sequence, behind: list[Sequence], now: float, bias: float) -> bool:
    """Whether somebody of those `behind` who is in time now would be late if `seq` came first."""
    walk.take(seq)
    for other in behind:
        walk.take(other)
        if not other.is_late and not other.num_emitted and now + walk.time_s * bias > other.deadline_s:
            return True
    return False

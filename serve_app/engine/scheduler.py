"""Who runs in the next step of one replica: continuous batching, chunked prefill, up to PP steps in flight.

Decode comes first, then prompts fill what is left of the step's token budget, the one with the earliest deadline for
its first token before all others (EDF); one that cannot meet it any more comes after those that can, for a while. Where
there are stages to keep busy, a step takes only its share of the decoding sequences, so that the others form the next
microbatches. Pages for all known tokens are taken when a sequence is admitted, one more whenever decoding fills the
last; when none is left, the sequence that arrived last gives up its own and is added again later (preemption).

No request starves and nothing deadlocks: pages are only ever taken from later arrivals, no sequence may grow beyond
the pool, and so the oldest one always gets what it needs, at the latest when the steps in flight are done.
"""

from collections import OrderedDict

import msgspec

from serve_app.engine.blocks import PagePool, extend_chain
from serve_app.engine.bounds import EngineConfig, Totals
from serve_app.engine.pace import Observed, Pace, Work, work_of
from serve_app.engine.plan import Plan, Slice, StepDone
from serve_app.engine.request import Emission
from serve_app.engine.sequence import Sequence

MIN_CHUNK_TOKENS = 128  # a smaller chunk reads the weights for too few tokens
MIN_ITL_CHUNK_TOKENS = 32  # however short the time between two tokens is to be: prompts must get on
LEARN_LENGTHS = 0.05  # weight of one more answer's length


class _Part(msgspec.Struct, frozen=True):
    """What one slice of a step in flight means to the engine."""

    seq: Sequence
    end: int  # known tokens [0, end) have their KV when the step is done
    samples: bool


class _Flight(msgspec.Struct):
    """A step in flight."""

    slices: list[Slice]
    parts: list[_Part]
    work: Work = Work()
    issued_s: float = 0.0
    done: StepDone | None = None  # it is done, but a step before it is not yet: messages may overtake each other


class Scheduler:
    """One replica in one epoch: its pages, who waits, who runs, which steps are in flight.

    A running sequence is prefilling (some of its known tokens are in no plan yet), ready (only its last token is), or
    has its next token in flight.
    """

    def __init__(self, config: EngineConfig, epoch: int, replica: int, num_pages: int, totals: Totals) -> None:
        self.config = config
        self._epoch = epoch
        self.replica = replica
        self._totals = totals
        self.pool = PagePool(num_pages)
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.running: dict[str, Sequence] = {}
        self.load_tokens = 0  # outstanding work of all that wait or run
        self.prefilling: dict[str, Sequence] = {}
        self._ready: dict[str, Sequence] = {}
        self._flights: dict[int, _Flight] = {}  # in the order of their issue
        self._next_step = 0
        self._last_step = -1  # of this epoch
        self._ended_s = -1.0  # when the last step ended; before the first of an epoch: never

    # -- requests in and out -----------------------------------------------------------------------------------

    def hit_tokens(self, seq: Sequence) -> int:
        """Tokens that this replica would not have to compute for `seq`."""
        return len(self._match(seq)) * self.config.page_tokens

    def add(self, seq: Sequence) -> None:
        """Put `seq`, which has nothing computed, into the queue, by its deadline and arrival."""
        seq.replica = self.replica
        self._enqueue(seq)
        self.load_tokens += seq.work_tokens

    def _enqueue(self, seq: Sequence) -> None:
        last = next(reversed(self.waiting.values()), None)
        is_last = last is None or last.order < seq.order
        later = [] if is_last else [s.rid for s in self.waiting.values() if s.order > seq.order]
        self.waiting[seq.rid] = seq
        for rid in later:
            self.waiting.move_to_end(rid)

    def renew(self, epoch: int) -> list[Plan]:
        """Go on in a new epoch with all KV as it is: the steps in flight, which are to be run again."""
        self._epoch = epoch
        self._last_step = -1
        self._ended_s = -1.0
        return [self._plan(step, flight.slices) for step, flight in self._flights.items() if flight.done is None]

    def _plan(self, step: int, slices: list[Slice]) -> Plan:
        after, self._last_step = self._last_step, step
        return Plan(self._epoch, self.replica, step, slices, after)

    def take_waiting(self) -> list[Sequence]:
        """Empty the queue: a new epoch may have a better place for those who only wait."""
        taken = list(self.waiting.values())
        for seq in taken:
            self.load_tokens -= seq.work_tokens
        self.waiting.clear()
        return taken

    def drop(self, seq: Sequence) -> None:
        """Forget an ended sequence; pages that steps in flight may still write to are freed when those are done."""
        self.load_tokens -= seq.work_tokens
        if self.waiting.pop(seq.rid, None) is None:
            self._stop_running(seq)
        if not seq.num_in_flight:
            self._release(seq)

    # -- steps -------------------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return bool(self._flights)

    @property
    def length_ratio(self) -> float:
        """Of answers to what was asked for at most, as learned."""
        return self._totals.length_ratio

    def flying(self) -> list[Work]:
        """What the steps in flight compute, in their order."""
        return [flight.work for flight in self._flights.values() if flight.done is None]

    def next_plan(self, pace: Pace | None = None, now: float = 0.0) -> Plan | None:
        """The next step, or None while the pipeline is full or nothing can run. `pace` tells what steps cost."""
        if len(self._flights) >= self.config.num_stages:
            return None
        self._demote_late(pace, now)
        slices: list[Slice] = []
        parts: list[_Part] = []
        budget = self.config.max_step_tokens
        budget -= self._take_decodes(slices, parts, budget)
        budget = min(budget, self._fair_prefill_tokens(), self.gentle_tokens(pace, len(slices)))
        budget -= self._take_prefills(slices, parts, budget)
        self._take_waiting(slices, parts, budget)
        if not slices:
            return None
        step, self._next_step = self._next_step, self._next_step + 1
        self._flights[step] = _Flight(slices, parts, work_of(slices), now)
        for part in parts:
            part.seq.planned_s = part.seq.planned_s or now
        self._totals.num_steps += 1
        return self._plan(step, slices)

    def observed(self, step: int, now: float) -> Observed | None:
        """What the end of a step at `now` says about the pace.

        Nothing where the pipeline was idle before it, or where the ends of two steps were told in the wrong order.
        """
        flight = self._flights.get(step)
        if flight is None or flight is not next(iter(self._flights.values())):
            return None
        before_s, self._ended_s = self._ended_s, now
        is_told_late = any(other.done is not None for other in self._flights.values())
        if before_s < 0 or flight.issued_s > before_s or is_told_late:
            return None
        return Observed(flight.work, now - before_s)

    def step_done(self, done: StepDone) -> list[Emission]:
        """Book a finished step: its KV is there, its tokens are emitted. An unknown or repeated step is ignored.

        A pipeline ends its steps in the order of their issue; one that is told of too early is booked in its turn.
        """
        flight = self._flights.get(done.step)
        if flight is None or flight.done is not None:
            return []
        assert len(done.tokens) == sum(part.samples for part in flight.parts), "one token for each slice that samples"
        flight.done = done
        emissions = []
        while self._flights and (flight := next(iter(self._flights.values()))).done is not None:
            del self._flights[flight.done.step]
            emissions += self._book(flight.parts, flight.done)
        return emissions

    def _book(self, parts: list[_Part], done: StepDone) -> list[Emission]:
        answers = iter(zip(done.tokens, done.logprobs, done.tops or [[] for _ in done.tokens], strict=True))
        emissions = []
        for part in parts:
            seq = part.seq
            seq.num_in_flight -= 1
            answer = next(answers) if part.samples else None
            if seq.finish is not None:  # cancelled meanwhile
                if not seq.num_in_flight:
                    self._release(seq)
                continue
            self._advance(seq, part.end)
            if answer is not None:
                emissions.append(self._accept(seq, *answer))
        return emissions

    # -- choosing ----------------------------------------------------------------------------------------------

    def _take_decodes(self, slices: list[Slice], parts: list[_Part], budget: int) -> int:
        """Ready sequences, at most an even share per stage; returns the tokens taken."""
        num_decoding = len(self.running) - len(self.prefilling)
        share = min(budget, -(-num_decoding // self.config.num_stages))
        num_taken = 0
        for rid, seq in list(self._ready.items()):
            if num_taken == share:
                break
            # one that was preempted for another of this very step is no longer ready
            if rid in self._ready and self._grow(seq):
                del self._ready[rid]
                self._issue(seq, 1, slices, parts)
                num_taken += 1
        return num_taken

    def _take_prefills(self, slices: list[Slice], parts: list[_Part], budget: int) -> int:
        """The next chunks of prompts that were begun; returns the tokens taken."""
        left = budget
        for seq in sorted(self.prefilling.values(), key=lambda s: s.order):
            if not left:
                break
            left -= self._issue_chunk(seq, left, slices, parts)
        return budget - left

    def _take_waiting(self, slices: list[Slice], parts: list[_Part], budget: int) -> None:
        """Admit in order while budget, pages and `max_running` allow."""
        while budget and self.waiting and len(self.running) < self.config.max_running:
            seq = next(iter(self.waiting.values()))
            if not self._admit(seq):
                break
            budget -= self._issue_chunk(seq, budget, slices, parts)

    def _fair_prefill_tokens(self) -> int:
        """Prompt tokens for one step, at most: all that are there are cut into a part for each stage to work on.

        When a replica takes over the sequences of another they are all there at once.
        """
        num_stages, enough = self.config.num_stages, self.config.num_stages * self.config.max_step_tokens
        outstanding = sum(len(seq.tokens) - seq.num_done for seq in self.prefilling.values())
        for seq in self.waiting.values():
            if outstanding >= enough:
                break
            outstanding += len(seq.tokens)
        return max(MIN_CHUNK_TOKENS, -(-outstanding // num_stages)) if num_stages > 1 else enough

    def gentle_tokens(self, pace: Pace | None, num_decoding: int) -> int:
        """Prompt tokens for one step, at most, for running streams to keep their inter-token objective.

        A stream has a token in every `num_stages`-th step.
        """
        itl_s, most = self.config.slo.itl_s, self.config.max_step_tokens
        if itl_s is None or pace is None or pace.costs is None or not num_decoding:
            return most
        left_s = itl_s / self.config.num_stages - pace.step_s(Work(0.0, num_decoding))
        token_s = pace.costs[1]
        return min(most, max(MIN_ITL_CHUNK_TOKENS, int(left_s / token_s))) if token_s > 0 else most

    def _demote_late(self, pace: Pace | None, now: float) -> None:
        """Those at the head of the queue that cannot have their first token in time any more: others still can."""
        for seq in list(self.waiting.values()):
            own_s = 0.0 if pace is None else pace.step_s(Work(len(seq.tokens)))
            if seq.is_late or seq.num_emitted or now + own_s <= seq.deadline_s:
                break
            seq.demote()
            del self.waiting[seq.rid]
            self._enqueue(seq)

    def late(self, now: float) -> list[Sequence]:
        """Those that wait, are late, and asked to be dropped then."""
        return [
            s
            for s in self.waiting.values()
            if s.request.terms.drops_late and not s.num_emitted and (s.is_late or now > s.due_s)
        ]

    def _issue_chunk(self, seq: Sequence, budget: int, slices: list[Slice], parts: list[_Part]) -> int:
        left = len(seq.tokens) - seq.num_sent
        num_tokens = min(budget, left, self._longest_chunk(seq))
        if num_tokens == left:
            del self.prefilling[seq.rid]
        self._issue(seq, num_tokens, slices, parts)
        return num_tokens

    def _longest_chunk(self, seq: Sequence) -> int:
        """Tokens of `seq` in one step, at most. A prompt is cut into a chunk for each stage, so that all work on it.

        Its first token then comes after (2 PP - 1) / PP of one stage's work on the whole prompt, and not after PP.
        """
        num_stages = self.config.num_stages
        return max(MIN_CHUNK_TOKENS, -(-len(seq.tokens) // num_stages)) if num_stages > 1 else len(seq.tokens)

    def _issue(self, seq: Sequence, num_tokens: int, slices: list[Slice], parts: list[_Part]) -> None:
        start, end = seq.num_sent, seq.num_sent + num_tokens
        samples = end == len(seq.tokens)
        pages = seq.pages[: -(-end // self.config.page_tokens)]
        slices.append(Slice(start, seq.tokens[start:end], pages, seq.sample() if samples else None))
        parts.append(_Part(seq, end, samples))
        seq.num_sent = end
        seq.num_in_flight += 1

    # -- pages -------------------------------------------------------------------------------------------------

    def _match(self, seq: Sequence) -> list[int]:
        """Cached pages of `seq`. The last known token is never among them: its logits are needed."""
        if not self.config.prefix_cache:
            return []
        num_pages = (len(seq.tokens) - 1) // self.config.page_tokens
        extend_chain(seq.chain, seq.tokens, self.config.page_tokens, num_pages)
        return self.pool.match(seq.chain[:num_pages])

    def _admit(self, seq: Sequence) -> bool:
        """Move the head of the queue to the running, with pages for all its known tokens; False if there are too few.

        One page for each running sequence stays free, or the newcomer would soon be preempted for their growth.
        """
        cached = self._match(seq)
        num_new = -(-len(seq.tokens) // self.config.page_tokens) - len(cached)
        if not self.pool.can_allocate(num_new + len(self.running), beside=cached):
            return False
        self.pool.hold(cached)
        seq.pages = cached + self.pool.allocate(num_new)
        seq.num_sent = seq.num_done = len(cached) * self.config.page_tokens
        seq.num_published = len(cached)
        self.load_tokens -= seq.num_done
        self.running[seq.rid] = self.prefilling[seq.rid] = self.waiting.pop(seq.rid)
        if not seq.was_admitted:
            self._count_admission(seq)
        return True

    def forget(self, totals: Totals) -> None:
        """Nobody holds a page: start with none cached, and count anew."""
        self._totals = totals
        self.pool = PagePool(self.pool.num_pages)

    def _count_admission(self, seq: Sequence) -> None:
        seq.was_admitted = True
        seq.num_cached = min(seq.num_done, seq.num_prompt)
        self._totals.prompt_tokens += seq.num_prompt
        if self.config.prefix_cache:
            self._totals.prefix_query_tokens += seq.num_prompt
            self._totals.prefix_hit_tokens += seq.num_cached

    def _grow(self, seq: Sequence) -> bool:
        """See that there is a page for the next token, from a later arrival if need be; False: not in this step."""
        if len(seq.pages) * self.config.page_tokens > seq.num_sent:
            return True
        while not self.pool.can_allocate(1):
            later = [s for s in self.running.values() if s.arrival > seq.arrival and not s.num_in_flight]
            if not later:
                return False
            self._preempt(max(later, key=lambda s: s.arrival))
        seq.pages += self.pool.allocate(1)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue, as a fresh add of all its tokens, before all that arrived later."""
        self._stop_running(seq)
        self.load_tokens += seq.num_done
        self._release(seq)
        seq.restart()
        self._enqueue(seq)
        self._totals.num_preemptions += 1

    def _stop_running(self, seq: Sequence) -> None:
        del self.running[seq.rid]
        self.prefilling.pop(seq.rid, None)
        self._ready.pop(seq.rid, None)

    def _release(self, seq: Sequence) -> None:
        self.pool.release(seq.pages)
        seq.pages = []

    # -- booking -----------------------------------------------------------------------------------------------

    def _advance(self, seq: Sequence, end: int) -> None:
        """The KV of the tokens [0, end) is computed: pages that are full by now may be read by others."""
        self.load_tokens -= end - seq.num_done
        seq.num_done = end
        num_full = end // self.config.page_tokens
        if num_full == seq.num_published or not self.config.prefix_cache:
            return
        extend_chain(seq.chain, seq.tokens, self.config.page_tokens, num_full)
        for i in range(seq.num_published, num_full):
            self.pool.publish(seq.pages[i], seq.chain[i])
        seq.num_published = num_full

    def _accept(self, seq: Sequence, token: int, logprob: float, top: list[tuple[int, float]]) -> Emission:
        emission = seq.accept(token, logprob, top)
        self._totals.generation_tokens += 1
        if emission.finish is None:
            self._ready[seq.rid] = seq
        else:
            self._learn_length(seq)
            self.drop(seq)
        return emission

    def _learn_length(self, seq: Sequence) -> None:
        ratio = seq.num_emitted / max(1, seq.limit_tokens - seq.num_prompt)
        self._totals.length_ratio += LEARN_LENGTHS * (ratio - self._totals.length_ratio)

    def check_integrity(self) -> None:
        """Assert that each page has as many references as holders, and that the sets and sums fit. O(all pages)."""
        self.pool.check_integrity()
        in_flight = {id(part.seq): part.seq for flight in self._flights.values() for part in flight.parts}
        holders = [*self.running.values(), *(s for s in in_flight.values() if s.finish is not None)]
        num_refs = [0] * self.pool.num_pages
        for page in (page for seq in holders for page in seq.pages):
            num_refs[page] += 1
        assert num_refs == [self.pool.num_refs(p) for p in range(self.pool.num_pages)], "a page has lost its holder"
        assert not any(seq.pages for seq in self.waiting.values()), "a waiting sequence holds pages"
        orders = [seq.order for seq in self.waiting.values()]
        assert orders == sorted(orders), "the queue is not in the order of its deadlines"
        assert not self._ready.keys() & self.prefilling.keys(), "a sequence is both ready and prefilling"
        for rid, seq in self.running.items():
            is_idle = rid in self._ready or rid in self.prefilling
            assert is_idle or seq.num_in_flight, f"{rid} runs but nothing is in flight for it"
        live = [*self.waiting.values(), *self.running.values()]
        assert self.load_tokens == sum(seq.work_tokens for seq in live), "the load has drifted"

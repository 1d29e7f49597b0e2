"""A model whose every token depends on all tokens before it, and a cluster that reads them back from KV pages only.

A mixed-up page, a prefix that is not the right one, a page freed too early, a lost or repeated token: each shows as a
wrong token, or as one of the cluster's own assertions.
"""

import zlib
from array import array
from collections import deque

from serve_app.engine.core import EngineConfig, EngineCore
from serve_app.engine.plan import Begin, Cancel, Emit, Plan, Run, StepDone, Submit
from serve_app.engine.request import Request, SamplingParams

VOCAB = 17
EOS = 0


def make_config(**changes):
    defaults = {"num_stages": 1, "page_tokens": 4, "max_running": 8, "max_step_tokens": 16, "max_context_tokens": 64}
    return EngineConfig(**{**defaults, "eos_token_ids": (EOS,), **changes})


def make_request(rid, prompt, max_new_tokens=8, emitted=(), **sampling):
    return Request(rid, list(prompt), SamplingParams(max_new_tokens=max_new_tokens, **sampling), list(emitted))


def choose(context, seed, banned=()):
    """The toy model: any change of any earlier token, of their number or of the seed changes the choice."""
    allowed = [token for token in range(VOCAB) if token not in banned]
    return allowed[zlib.crc32(array("q", [seed, *context]).tobytes()) % len(allowed)]


def undisturbed(request, config, num_pages):
    """(all emitted tokens, finish) of a request served alone by one that never fails."""
    sampling, emitted = request.sampling, list(request.emitted)
    ends = {*sampling.stop_token_ids} | (set() if sampling.ignore_eos else {*config.eos_token_ids})
    num_most = min(
        len(request.prompt) + sampling.max_new_tokens, config.max_context_tokens, num_pages * config.page_tokens + 1
    )
    while True:
        if emitted and emitted[-1] in ends:
            return emitted, "stop"
        if len(request.prompt) + len(emitted) >= num_most:
            return emitted, "length"
        banned = ends if len(emitted) < sampling.min_new_tokens else ()
        emitted.append(choose([*request.prompt, *emitted], sampling.seed, banned))


class Replica:
    """KV memory and a pipeline that ends its steps in the order of their issue."""

    def __init__(self, num_pages, page_tokens):
        self.page_tokens = page_tokens
        self.memory = [[None] * page_tokens for _ in range(num_pages)]
        self.plans = deque()

    def slots(self, part):
        """The (page, offset) of each of the part's positions [0, end)."""
        end = part.start + len(part.tokens)
        assert len(part.pages) == -(-end // self.page_tokens), "pages cover exactly the tokens known to the slice"
        return [(part.pages[i // self.page_tokens], i % self.page_tokens) for i in range(end)]

    def issue(self, plan):
        """Take a plan. No step may write where another one in flight, or another slice of it, reads or writes."""
        used = [slot for earlier in self.plans for part in earlier.slices for slot in self.slots(part)]
        used = set(used)
        for part in plan.slices:
            written = set(self.slots(part)[part.start :])
            assert not written & used, "a page was given away while a step in flight could still use it"
        for i, part in enumerate(plan.slices):
            written = set(self.slots(part)[part.start :])
            others = {slot for j, other in enumerate(plan.slices) if j != i for slot in self.slots(other)}
            assert not written & others, "two slices of a step share a slot that one of them writes"
        self.plans.append(plan)

    def half_run(self):
        """Run what is in flight, and tell nobody: so far steps may have come when their epoch ended."""
        for plan in self.plans:
            self.compute(plan)

    def compute(self, plan):
        """One token for each slice that samples, from what the pages hold."""
        tokens = []
        for part in plan.slices:
            slots = self.slots(part)
            for (page, offset), token in zip(slots[part.start :], part.tokens, strict=True):
                self.memory[page][offset] = token
            if part.sample is not None:
                context = [self.memory[page][offset] for page, offset in slots]
                assert None not in context, "KV is read that was never written"
                assert part.sample.position == len(context)
                tokens.append(choose(context, part.sample.seed, part.sample.banned))
        return tokens


class Cluster:
    """Drives an EngineCore, checks each command against the protocol and every stream against the toy model."""

    def __init__(self, config, num_pages):
        self.config = config
        self.num_pages = num_pages
        self.core = EngineCore(config)
        self.replicas: list[Replica] = []
        self.resting = ()
        self.dropped = []  # plans that were in flight when their epoch ended on a replica that was kept
        self.known = {}  # rid -> tokens that are allowed to come again
        self.requests = {}
        self.streams = {}
        self.finishes = {}
        self.num_cached = {}
        self.steps_seen = set()
        self.past = []  # StepDones delivered
        self.plans: list[Plan] = []  # all ever issued

    # -- events --------------------------------------------------------------------------------------------------

    def begin(self, num_replicas, epoch=None, resting=(), kept=()):
        """A new epoch. `kept` replicas have their memory still, and run again what was in flight."""
        epoch = self.core.epoch + 1 if epoch is None else epoch
        kept = tuple(i for i in kept if i < min(num_replicas, len(self.replicas)) and i not in resting + self.resting)
        if epoch > self.core.epoch:
            before, self.resting = self.replicas, tuple(resting)
            self.replicas = [
                before[i] if i in kept else Replica(self.num_pages, self.config.page_tokens)
                for i in range(num_replicas)
            ]
            for i in kept:
                self.replicas[i].half_run()
                self.dropped += self.replicas[i].plans
                self.replicas[i].plans.clear()
        return self.on(Begin(epoch, num_replicas, self.num_pages, resting, kept))

    def submit(self, request):
        if request.rid not in self.requests:
            self.requests[request.rid] = request
            self.streams[request.rid] = list(request.emitted)
        else:
            self.known[request.rid] = len(request.emitted)
        return self.on(Submit(request))

    def cancel(self, rid):
        return self.on(Cancel(rid))

    def ended_early(self, replica):
        """The newest step in flight is told of first: messages may overtake each other."""
        home = self.replicas[replica]
        tokens = [home.compute(plan) for plan in home.plans]
        for plan, answer in reversed([*zip(home.plans, tokens, strict=True)]):
            self.past.append(StepDone(plan.epoch, plan.replica, plan.step, answer, [-0.5] * len(answer)))
        told = self.past[-len(tokens) :]
        home.plans.clear()
        for done in told:
            self.on(done)

    def step(self, replica=0):
        """End the oldest step of `replica`, computing it twice: a step is idempotent."""
        home = self.replicas[replica]
        plan = home.plans.popleft()
        tokens = home.compute(plan)
        assert home.compute(plan) == tokens
        done = StepDone(plan.epoch, plan.replica, plan.step, tokens, [-0.5] * len(tokens))
        self.past.append(done)
        return self.on(done)

    def drain(self, most_steps):
        """End steps, replica after replica, until all requests are out."""
        for _ in range(most_steps):
            busy = [i for i, replica in enumerate(self.replicas) if replica.plans]
            if not self.unfinished():
                return
            assert busy, f"deadlock: {self.unfinished()} wait and nothing is in flight"
            for replica in busy:
                self.step(replica)
        raise AssertionError(f"starved after {most_steps} rounds: {self.unfinished()}")

    def unfinished(self):
        return [rid for rid in self.requests if rid not in self.finishes]

    def on(self, event):
        commands = self.core.on(event, 0.0)
        for command in commands:
            match command:
                case Run(plan):
                    self._run(plan)
                case Emit(emission):
                    self._emit(emission)
        self.core.check_integrity()
        return commands

    # -- commands ------------------------------------------------------------------------------------------------

    def _run(self, plan):
        assert plan.epoch == self.core.epoch
        assert (plan.epoch, plan.replica, plan.step) not in self.steps_seen, "a step's number was used again"
        assert plan.after == max((s for e, r, s in self.steps_seen if (e, r) == (plan.epoch, plan.replica)), default=-1)
        self.steps_seen.add((plan.epoch, plan.replica, plan.step))
        assert 0 < sum(len(part.tokens) for part in plan.slices) <= self.config.max_step_tokens
        self.replicas[plan.replica].issue(plan)
        assert len(self.replicas[plan.replica].plans) <= self.config.num_stages
        self.plans.append(plan)

    def _emit(self, emission):
        rid = emission.rid
        assert rid not in self.finishes, f"{rid} emits after its end"
        stream = self.streams[rid]
        assert emission.first == self.known.pop(rid, len(stream)), f"{rid} skips or repeats tokens"
        assert stream[emission.first :] == emission.tokens[: len(stream) - emission.first], "other tokens come again"
        del stream[emission.first :]
        asked = self.requests[rid].sampling.logprobs
        assert len(emission.logprobs) == (len(emission.tokens) if asked else 0)
        self.streams[rid] += emission.tokens
        assert self.num_cached.setdefault(rid, emission.num_cached) == emission.num_cached, "only the first stay counts"
        assert emission.num_cached <= len(self.requests[rid].prompt)
        if emission.finish is not None:
            self.finishes[rid] = emission.finish

    # -- verdicts ------------------------------------------------------------------------------------------------

    def check_streams(self):
        """Every request has the tokens of an undisturbed run, or the beginning of them if it was cancelled."""
        for rid, request in self.requests.items():
            tokens, finish = undisturbed(request, self.config, self.num_pages)
            if self.finishes[rid] == "abort":
                assert self.streams[rid] == tokens[: len(self.streams[rid])], f"{rid} has other tokens"
            else:
                assert (self.streams[rid], self.finishes[rid]) == (tokens, finish), f"{rid} has other tokens"

    def check_idle(self):
        """Once the steps of cancelled requests are done too, nobody holds a page."""
        for i, replica in enumerate(self.replicas):
            while replica.plans:
                self.step(i)
        stats = self.core.stats()
        assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)
        assert sum(stats.finished_total.values()) == len(self.requests)

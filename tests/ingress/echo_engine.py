"""The real EngineCore over a toy model that says what a test told it to say, and that a test can hold still."""

import asyncio
from contextlib import suppress

from msgspec import structs

from serve_app.engine.core import EngineConfig, EngineCore
from serve_app.engine.plan import Abort, Begin, Cancel, Emit, Refuse, Run, StepDone, Submit
from serve_app.engine.request import Emission
from serve_app.ingress.client import EngineStatus, EngineUnavailableError
from serve_app.ingress.faults import AbortedError, RefusedError, TakenOverError
from serve_app.runtime.operations import Drain, Facts, Operations, Strike
from serve_app.runtime.snapshot import PaceView
from tests.views import make_view

PAGE_TOKENS = 4
END_TOKEN = 2  # <|im_end|> of the tiny tokenizer
KEEP_S = 60.0


class EchoEngine:
    """Answers a prompt as `script` says, and one that it does not know with `babble` for ever."""

    def __init__(self, babble, max_context_tokens=512, num_pages=4096):
        config = EngineConfig(
            num_stages=1,
            max_context_tokens=max_context_tokens,
            page_tokens=PAGE_TOKENS,
            max_running=64,
            eos_token_ids=(END_TOKEN,),
            keep_s=KEEP_S,
        )
        self.core = EngineCore(config)
        self.core.on(Begin(epoch=0, num_replicas=1, num_pages=num_pages), 0.0)
        self.script = {}  # tuple of prompt ids -> answer ids
        self.next_answer = None  # ids: the answer to the next prompt, whatever that is
        self.requests = {}  # rid -> Request, all ever submitted
        self.cancelled = []  # rids
        self.now_s = 0.0
        self.submitted = asyncio.Event()
        self.was_cancelled = asyncio.Event()
        self.running = asyncio.Event()  # cleared: no step is computed
        self.running.set()
        self.hold_after = None  # clear `running` after so many steps, each time it is set
        self.broken = ""  # why there is no engine
        self.view = make_view(1, 2, 2)  # what its router would say
        self.history = []  # EventViews
        self.family = []  # ProcessViews
        self.pace_of_it = PaceView("echo", 1, 1, 1, 512, [])
        self.refusing = []  # errors with which the next requests are refused
        self.failing_after = None  # every answer ends with "error" after so many tokens
        self.operations_of_it = Operations()
        self.facts = Facts(0, ["w0"], 1, 1, "tcp://router", "whole", "")  # its cell, for what was ordered of it
        self.struck = []  # (role, name)
        self._babble = babble
        self._queues = {}
        self._kv = {}  # (page, offset) -> token
        self._steps = asyncio.Queue()
        self._worker = asyncio.ensure_future(self._work())

    async def close(self):
        self._worker.cancel()
        with suppress(asyncio.CancelledError):
            await self._worker

    async def submit(self, request):
        if self.broken:
            raise EngineUnavailableError(self.broken)
        if self.refusing:
            raise self.refusing.pop()
        if request.rid in self._queues:
            self._queues[request.rid].put_nowait(TakenOverError("taken over by a newer connection"))
        queue = self._queues[request.rid] = asyncio.Queue()
        self.requests[request.rid] = request
        if self.next_answer is not None:
            self.script[tuple(request.prompt)], self.next_answer = self.next_answer, None
        self.submitted.set()
        self._on(Submit(request))
        finished = False
        try:
            while not finished:
                emission = await queue.get()
                if isinstance(emission, Exception):
                    finished = not isinstance(emission, TakenOverError)
                    raise emission
                finished = emission.finish is not None
                yield emission
        finally:
            if self._queues.get(request.rid) is queue:
                del self._queues[request.rid]
                if not finished:
                    self.cancelled.append(request.rid)
                    self._on(Cancel(request.rid))
                    self.was_cancelled.set()

    async def status(self):
        if self.broken:
            raise EngineUnavailableError(self.broken)
        drained = "draining" if self.operations_of_it.is_draining else ""
        return EngineStatus(True, not drained, drained, page_tokens=PAGE_TOKENS, stats=self.core.stats())

    async def abort(self, name, tenant=None):
        if self.broken:
            raise EngineUnavailableError(self.broken)
        self._on(Abort(name, tenant), is_abort=True)

    async def operate(self, asked):
        if self.broken:
            raise EngineUnavailableError(self.broken)
        return self.operations_of_it.begin(asked, f"op-{len(self.operations_of_it.all())}", self.now_s)

    async def operations(self):
        if self.broken:
            raise EngineUnavailableError(self.broken)
        return self.operations_of_it.all()

    def look(self, **facts):
        """Carry on with what was ordered; `facts` are what has changed in the cell."""
        stats = self.core.stats()
        self.facts = structs.replace(self.facts, open_requests=stats.running + stats.waiting, **facts)
        for act in self.operations_of_it.observe(self.facts, self.now_s):
            match act:
                case Drain(on):
                    self.core.admission.draining = on
                case Strike(role, name):
                    self.struck.append((role, name))

    async def placement(self):
        if self.broken:
            raise EngineUnavailableError(self.broken)
        return self.view

    async def events(self):
        if self.broken:
            raise EngineUnavailableError(self.broken)
        return self.history

    async def pace(self):
        if self.broken:
            raise EngineUnavailableError(self.broken)
        return self.pace_of_it

    async def processes(self):
        if self.broken:
            raise EngineUnavailableError(self.broken)
        return self.family

    def forget(self):
        """Time passes: what was kept for those who lost their streams is gone."""
        self.now_s += KEEP_S

    def assert_idle(self):
        self.core.check_integrity()
        stats = self.core.stats()
        assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)

    def _on(self, event, *, is_abort=False):
        for command in self.core.on(event, self.now_s):
            match command:
                case Run(plan):
                    self._steps.put_nowait(plan)
                case Emit(emission) if is_abort:
                    self._queues[emission.rid].put_nowait(AbortedError("aborted by its name"))
                case Emit(emission):
                    self._deliver(emission)
                case Refuse(refusal):
                    error = RefusedError(refusal.reason, refusal.text, refusal.retry_after_s)
                    self._queues[refusal.rid].put_nowait(error)

    def _deliver(self, emission):
        queue = self._queues.get(emission.rid)
        if queue is None:
            return
        if self.failing_after is not None and emission.first + len(emission.tokens) > self.failing_after:
            queue.put_nowait(Emission(emission.rid, emission.first, [], [], emission.num_cached, "error"))
            self._on(Cancel(emission.rid))
            return
        queue.put_nowait(emission)

    async def _work(self):
        num_done = 0
        while True:
            plan = await self._steps.get()
            await self.running.wait()
            num_done += 1
            if num_done == self.hold_after:
                self.running.clear()
                num_done = 0
            await asyncio.sleep(0)  # each step is a turn of the loop of its own
            tokens = [self._compute(part) for part in plan.slices]
            chosen = [(part.sample, token) for part, token in zip(plan.slices, tokens, strict=True) if part.sample]
            sampled = [token for _, token in chosen]
            tops = [[(token + i, -0.5 - i) for i in range(sample.top_logprobs)] for sample, token in chosen]
            self._on(StepDone(plan.epoch, plan.replica, plan.step, sampled, [-0.5] * len(sampled), tops))

    def _compute(self, part):
        for position, token in enumerate(part.tokens, part.start):
            self._kv[part.pages[position // PAGE_TOKENS], position % PAGE_TOKENS] = token
        num_known = part.start + len(part.tokens)
        return self._next([self._kv[part.pages[p // PAGE_TOKENS], p % PAGE_TOKENS] for p in range(num_known)])

    def _next(self, context):
        for prompt, answer in self.script.items():
            if tuple(context[: len(prompt)]) == prompt:
                said = len(context) - len(prompt)
                return answer[said] if said < len(answer) else END_TOKEN
        return self._babble[len(context) % len(self._babble)]

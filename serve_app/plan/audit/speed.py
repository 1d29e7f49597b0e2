"""Checks of rates, of times to the first token, and of links."""

from collections.abc import Iterator

from serve_app.plan.audit.facts import Check, Facts
from serve_app.plan.audit.readings import Formula, Judgement, agrees, judge, number
from serve_app.plan.counts import count_params
from serve_app.plan.estimate import Cost
from serve_app.plan.ops import Step

_SLACK = 1.01  # figures that agree to 1 % are the same
_ROUND_SHARE = 0.05  # of a limit: 0.80, 0.85, 0.90 are nobody's result


# -- rates ----------------------------------------------------------------------------------------------------------


def throughput(facts: Facts) -> Judgement:
    """Tokens/ms of one GPU. Nothing is as fast as prefill of the shortest prompts."""
    declared = facts.number("performance.tokens_ms_gpu")
    shown, computed = f"{number(declared)} tokens/ms", _prefill(facts)
    if declared <= _SLACK * min(facts.bounds(spec).prefill_tokens_ms(facts.longest) for spec in facts.specs):
        return Judgement(shown, computed, "holds", "as prefill, at every declared length")
    needed = facts.flops / (2e3 * declared) / 1e9
    fewest = _fewest_active_b(facts)
    limit = f"{number(facts.flops / 1e12)} TFLOP/s / (2 x {number(declared)} tokens/ms) = {needed:.2f} B parameters"
    if needed * _SLACK < fewest:
        reading = f"it leaves {limit} for a token, and top-{facts.top_ks[0]} has at least {fewest:.2f} B"
        return Judgement(shown, computed, "does not hold", reading)
    reading = (
        f"it is prefill of prompts with {limit} active (top-{facts.top_ks[0]} of the declared total: {fewest:.2f} B),"
        " no attention scores, no links, no bubble"
    )
    return Judgement(shown, computed, "holds only if", reading)


def _fewest_active_b(facts: Facts) -> float:
    """Of the declared number of parameters, with the fewest experts of a token."""
    params = count_params(facts.specs[0])
    total = facts.number("model.total_params_b") if facts.given("model.total_params_b") else params.total / 1e9
    return min(params.active / params.total * total, params.active / 1e9)


def _prefill(facts: Facts) -> str:
    lengths = sorted({facts.shortest, facts.longest})
    rates = [
        f"{number(round(facts.bounds(spec).prefill_tokens_ms(length), 1))} @{length:,} top-{spec.top_k}"
        for spec in facts.specs
        for length in lengths
    ]
    return f"prefill {', '.join(rates)} ({facts.working.name})"


def required(facts: Facts) -> Judgement:
    declared = facts.number("performance.required_tokens_ms_gpu")
    longest = {spec.top_k: facts.bounds(spec).longest_prompt_at(declared) for spec in facts.specs}
    shown, computed = f"{number(declared)} tokens/ms", _prefill(facts)
    each = "; ".join(
        f"top-{top_k}: prompts up to {most:,} tokens" if most else f"top-{top_k}: never"
        for top_k, most in longest.items()
    )
    if min(longest.values()) >= facts.longest:
        return Judgement(shown, computed, "holds", each)
    return Judgement(
        shown, computed, "holds only if" if max(longest.values()) >= facts.shortest else "does not hold", each
    )


def decode(facts: Facts) -> Judgement:
    """Answers: every round reads the weights and all KV."""
    batch, bounds = facts.batch, facts.bounds(facts.working.spec)
    lengths = sorted({facts.shortest, facts.longest})
    rates = [bounds.decode_tokens_ms(batch, length) for length in lengths]
    floors = [bounds.decode_round_s(batch, length) * 1e3 for length in lengths]
    computed = ", ".join(f"{rate:.2g} @{length:,}" for rate, length in zip(rates, lengths, strict=True)) + " tokens/ms"
    reading = f"between two tokens at least {' / '.join(f'{floor:.1f}' for floor in floors)} ms at {batch} sequences"
    if not facts.given("performance.decode_tokens_ms_gpu"):
        if facts.given("performance.tokens_ms_gpu"):
            reading += f"; {number(facts.number('performance.tokens_ms_gpu'))} tokens/ms is no rate of answers"
        return Judgement("nothing", computed, "missing", reading)
    declared = facts.number("performance.decode_tokens_ms_gpu")
    shown = f"{number(declared)} tokens/ms"
    if declared <= rates[-1] * _SLACK:
        return Judgement(shown, computed, "holds", reading)
    if declared <= rates[0] * _SLACK:
        return Judgement(shown, computed, "holds only if", f"contexts are shorter than {lengths[-1]:,}: {reading}")
    return Judgement(shown, computed, "does not hold", reading)


def total_throughput(facts: Facts) -> Judgement:
    right = facts.number("performance.tokens_ms_gpu") * facts.count("hardware.gpus")
    remark = "performance.tokens_ms_gpu x hardware.gpus, and no better than that"
    return judge(facts.number("performance.total_tokens_ms"), right, "tokens/ms", remark=remark)


def margin(facts: Facts) -> Judgement:
    right = facts.number("performance.tokens_ms_gpu") / facts.number("performance.required_tokens_ms_gpu") - 1
    return judge(facts.number("performance.margin"), right, "", remark="the declared rate over the required one")


# -- times ----------------------------------------------------------------------------------------------------------


def _batch_s(facts: Facts) -> dict[str, float]:
    """A batch of the longest prompts at the declared rates, the achieved one first."""
    fields = {"at performance.tokens_ms_gpu": "tokens_ms_gpu", "at the required rate": "required_tokens_ms_gpu"}
    tokens = facts.batch * facts.longest
    return {
        text: tokens / (facts.number(f"performance.{name}") * 1e3 * facts.count("hardware.gpus"))
        for text, name in fields.items()
        if facts.given(f"performance.{name}")
    }


def _at_once_s(facts: Facts) -> list[float]:
    return [facts.bounds(spec).at_once_s(facts.batch, facts.longest) for spec in facts.specs]


def batch_time(facts: Facts) -> Judgement:
    """Against the rate that is declared; where none is, against the computed one."""
    found = _batch_s(facts)
    computed = " / ".join(f"{seconds:.3f}" for seconds in _at_once_s(facts))
    remark = f"computed of {facts.working.name}: {computed} s, fill of the pipeline included"
    right = next(iter(found.values()), _at_once_s(facts)[0])
    formulas = [Formula(f"{facts.batch} x {facts.longest:,} tokens {text}", seconds) for text, seconds in found.items()]
    result = judge(facts.number("performance.batch_s"), right, "s", formulas, remark=remark)
    return Judgement(result.declared, result.computed, result.verdict, "; ".join({result.reading: 0, remark: 0}))


def ttft(facts: Facts) -> Judgement:
    """Between a prompt alone and the last of a batch; what is beyond is a queue."""
    declared = facts.number("performance.ttft_s")
    alone = [facts.bounds(spec).alone_s(facts.longest) for spec in facts.specs]
    at_once = _at_once_s(facts)
    computed = (
        f"{' / '.join(f'{s:.3f}' for s in alone)} s alone, {' / '.join(f'{s:.2f}' for s in at_once)} s all at once"
    )
    shown = f"{number(declared)} s"
    if min(alone) <= declared * _SLACK and declared <= max(at_once) * _SLACK:
        return Judgement(shown, computed, "holds", f"a prompt of {facts.longest:,} tokens, computed")
    if declared < min(alone):
        return Judgement(shown, computed, "does not hold", "less than computing it takes")
    return Judgement(
        shown, computed, "does not hold", "no computation takes so long; " + "; or ".join(_queues(facts, declared))
    )


def _queues(facts: Facts, declared: float) -> Iterator[str]:
    """What may have been meant."""
    tokens = facts.batch * facts.longest
    for text, seconds in _batch_s(facts).items():
        num = declared / seconds
        yield f"{num:.2f} batches {text}: {num * facts.batch:,.0f} requests, {num * tokens / 1e6:.1f} M tokens queued"
    if batch_s := max(_batch_s(facts).values(), default=0.0):
        waits = declared / batch_s - 1
        # M/D/1: the mean wait is u / (2 (1 - u)) services at a share u of busy time
        yield f"a queue that is busy {2 * waits / (1 + 2 * waits):.1%} of the time"
    if facts.given("performance.ttft_limit_s"):
        share = declared / facts.number("performance.ttft_limit_s")
        if agrees(round(share / _ROUND_SHARE) * _ROUND_SHARE, share):
            yield f"{share:.2f} of performance.ttft_limit_s"


def ttft_limit(facts: Facts) -> Judgement:
    """A limit of admission: as many tokens may wait as are computed in that time."""
    limit, at_once = facts.number("performance.ttft_limit_s"), _at_once_s(facts)
    alone = max(facts.bounds(spec).alone_s(facts.longest) for spec in facts.specs)
    shown, computed = f"{number(limit)} s", f"{' / '.join(f'{s:.2f}' for s in at_once)} s all at once"
    budgets = [facts.bounds(spec).queued_tokens(limit, facts.batch, facts.longest) for spec in facts.specs]
    reading = f"admit while {' / '.join(f'{tokens / 1e6:.1f}' for tokens in budgets)} M tokens are queued at most"
    if max(at_once) <= limit * _SLACK:
        return Judgement(shown, computed, "holds", reading)
    if alone <= limit * _SLACK:
        return Judgement(shown, computed, "holds only if", f"fewer come at once: {reading}")
    return Judgement(shown, computed, "does not hold", f"one prompt alone takes {alone:.2f} s")


def ttft_margin(facts: Facts) -> Judgement:
    right = facts.number("performance.ttft_limit_s") - facts.number("performance.ttft_s")
    return judge(facts.number("performance.ttft_margin_s"), right, "s", remark="limit less declared time")


# -- links ----------------------------------------------------------------------------------------------------------


def tp_bandwidth(facts: Facts) -> Judgement:
    """What a link carries is read from memory and written to memory."""
    declared, memory = facts.number("links.tp_group_tb_s"), facts.number("hardware.bandwidth_tb_s")
    figures = facts.declared.hardware
    rates = sorted({declared * 1000, figures.intra_gb_s, figures.inter_gb_s}, reverse=True)
    cost = Cost(facts.working.spec, facts.precision, facts.system, facts.deployment, by_all_reduce=True)
    sent = sum(op.link_bytes for op in cost.breakdown(Step.prompt(facts.longest)) if op.name == "all-reduce")
    each = ", ".join(f"{sent / rate / 1e6:.1f} ms at {rate:,.0f} GB/s" for rate in rates)
    reading = f"all-reduces of a prompt of {facts.longest:,} tokens take {each}"
    shown, computed = f"{number(declared)} TB/s", f"below {number(memory)} TB/s"
    if declared < memory:
        return Judgement(shown, computed, "holds", f"an input, not a result; {reading}")
    same = "it is the bandwidth of the memory, copied" if agrees(declared, memory) else "memory is not as fast"
    return Judgement(shown, computed, "does not hold", f"{same}: a link is an input of its own; {reading}")


def sync_latency(facts: Facts) -> Judgement:
    """Against the constant that every exchange of a step is priced with."""
    declared, right = facts.number("links.sync_us"), facts.system.efficiency.collective_us
    num = 2 * facts.count("model.layers")
    floor = f"{num} all-reduces of a step take {num * right / 1000:.2g} ms at least, however small"
    shown, computed = f"{number(declared)} us", f"about {number(right)} us"
    if declared * 2 >= right:
        return Judgement(shown, computed, "holds", floor)
    reading = f"one write to a neighbour's memory may take that, no exchange among GPUs does: {floor}"
    return Judgement(shown, computed, "does not hold", reading)


CHECKS = (
    Check("throughput", "performance.tokens_ms_gpu", throughput),
    Check("required throughput", "performance.required_tokens_ms_gpu", required),
    Check("decode throughput", "performance.decode_tokens_ms_gpu", decode, speaks_up=True),
    Check("total throughput", "performance.total_tokens_ms", total_throughput),
    Check("throughput margin", "performance.margin", margin),
    Check("batch time", "performance.batch_s", batch_time),
    Check("TTFT", "performance.ttft_s", ttft),
    Check("TTFT limit", "performance.ttft_limit_s", ttft_limit),
    Check("TTFT margin", "performance.ttft_margin_s", ttft_margin),
    Check("TP bandwidth", "links.tp_group_tb_s", tp_bandwidth),
    Check("synchronization latency", "links.sync_us", sync_latency),
)

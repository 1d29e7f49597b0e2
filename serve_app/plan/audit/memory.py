"""Checks of what one GPU is said to hold."""

from collections.abc import Iterator

from serve_app.plan.audit.facts import CHUNK_TOKENS, Check, Facts, Sized, distinct
from serve_app.plan.audit.readings import Formula, Judgement, agrees, gb, in_gb, judge, number
from serve_app.plan.counts import attention_params, expert_params
from serve_app.plan.footprint import Footprint, kv_gpu_token_bytes, max_kv_tokens
from serve_app.plan.training import ADAM_BYTES

_OPTIMIZERS = {"Adam with fp32 master weights": ADAM_BYTES, "Adam's two moments": 8, "Adam's moments in 16 bits": 4}
_PARTS = ("expert_gb", "attention_gb", "activation_gb", "optimizer_gb", "kv_gb")
_MOST_TIMES = 4


def expert_memory(facts: Facts) -> Judgement:
    """Of the primaries. Computed of the declared sizes, since that is what the document multiplies."""
    num, declared = facts.count("layout.experts_per_gpu"), facts.number("memory.expert_gb")
    size = facts.value_bytes

    def formulas() -> Iterator[Formula]:
        for sized in facts.models:
            yield from in_gb(_experts(num, sized, size), num * expert_params(sized.spec) * size, sized.against)
        if facts.given("model.total_params_b") and facts.given("hardware.gpus"):
            total, gpus = facts.number("model.total_params_b"), facts.count("hardware.gpus")
            text = f"{number(total)}e9 parameters x {size:g} / {gpus} GPUs, which has attention in it"
            yield from in_gb(text, total * 1e9 * size / gpus, "memory.attention_gb")

    right = num * expert_params(facts.as_declared.spec) * size / 1e9
    return judge(declared, right, "GB", formulas(), none=f"{_experts(num, facts.as_declared, size)} is {number(right)}")


def _experts(num: int, sized: Sized, size: float) -> str:
    return f"{num} experts x 3 x {sized.spec.hidden_size} x {sized.spec.expert_size} x {size:g}"


def attention_memory(facts: Facts) -> Judgement:
    layout, size = facts.deployment, facts.value_bytes
    layers, stage = facts.count("model.layers"), facts.stage_layers

    def formulas() -> Iterator[Formula]:
        for sized in facts.models:
            one = attention_params(sized.spec) * size
            name = f"attention of {sized.name}"
            yield from in_gb(f"{name}, {stage} layers, cut by TP", stage * one / layout.tp, sized.against)
            yield from in_gb(f"{name}, {stage} layers, not cut by TP", stage * one, sized.against)
            yield from in_gb(f"{name}, all {layers} layers, cut by TP", layers * one / layout.tp, sized.against)
            yield from in_gb(f"{name}, all {layers} layers, neither cut by TP nor by PP", layers * one, sized.against)

    right = stage * attention_params(facts.working.spec) * size / layout.tp / 1e9
    return judge(facts.number("memory.attention_gb"), right, "GB", formulas(), remark=facts.working.name)


def activations(facts: Facts) -> Judgement:
    """In serving: what the step of one chunk needs."""
    declared = facts.number("memory.activation_gb")
    tokens, stage, size, dp = facts.batch * facts.longest, facts.stage_layers, facts.value_bytes, facts.deployment.dp
    right = max(facts.held(spec, 1, 1).step_bytes for spec in facts.specs) / 1e9

    def formulas() -> Iterator[Formula]:
        for sized in facts.models:
            hidden = sized.spec.hidden_size
            for split, share in ((1, "the whole batch, no DP split"), (dp, "the batch of one replica")):
                rows = f"{facts.batch} x {facts.longest} tokens x {hidden}"
                saved = tokens * hidden * size * stage / split
                text = f"training: {rows} x {size:g} x {stage} layers, one residual saved for each layer, {share}"
                yield from in_gb(text, saved, sized.against)
                yield from in_gb(f"training: {rows} in fp32, {share}", tokens * hidden * 4 / split, sized.against)

    if declared >= right and not any(agrees(declared, formula.value) for formula in formulas()):
        text = f"a step of {CHUNK_TOKENS:,} tokens needs {number(right)} GB: more is set aside than is needed"
        return Judgement(f"{number(declared)} GB", f"{number(right)} GB", "holds only if", text)
    return judge(declared, right, "GB", formulas(), remark=f"a step of {CHUNK_TOKENS:,} tokens")


def optimizer(facts: Facts) -> Judgement:
    """Nothing is optimized in serving."""
    declared = facts.number("memory.optimizer_gb")
    shown = f"{number(declared)} GB"
    if not declared:
        return Judgement(shown, "0 GB", "holds")
    params = facts.number("model.total_params_b") * 1e9 / facts.count("hardware.gpus")
    found = [name for name, size in _OPTIMIZERS.items() if agrees(declared, params * size / 1e9)]
    if found:
        return Judgement(shown, "0 GB", "not applicable in serving", f"{found[0]}, {params * 1e-6:,.1f} M parameters")
    adam = ", ".join(f"{name} would be {gb(params * size)}" for name, size in _OPTIMIZERS.items())
    reading = f"{declared * 1e9 / params:.0f} bytes per parameter are no optimizer's: {adam}"
    rest = _remainder(facts)
    if rest is not None and agrees(declared, rest):
        share, memory = facts.number("memory.share"), facts.number("hardware.memory_gb")
        reading = f"it is what is left of {share:g} x {memory:g} GB by the other parts = {number(rest)}; {reading}"
    return Judgement(shown, "0 GB", "does not hold", reading)


def _remainder(facts: Facts) -> float | None:
    """GB of the declared share that no other part takes."""
    if not (facts.given("memory.share") and facts.given("hardware.memory_gb")):
        return None
    rest = [facts.number(f"memory.{name}") for name in _PARTS if facts.given(f"memory.{name}")]
    return facts.number("memory.share") * facts.number("hardware.memory_gb") - (
        sum(rest) - facts.number("memory.optimizer_gb")
    )


def total_memory(facts: Facts) -> Judgement:
    """The sum of the declared parts, and beside it what the planner finds."""
    parts = [facts.number(f"memory.{name}") for name in _PARTS if facts.given(f"memory.{name}")]
    declared = facts.number("memory.total_gb")
    if not parts:
        held = _serving(facts).total_bytes / 1e9
        return judge(declared, held, "GB", remark=_breakdown(facts))
    none = f"the declared parts are {number(sum(parts))} GB"
    return judge(
        declared, sum(parts), "GB", remark=f"the sum; {_breakdown(facts)}", none=f"{none}; {_breakdown(facts)}"
    )


def _serving(facts: Facts) -> Footprint:
    return facts.held(facts.working.spec, facts.batch, facts.longest)


def _breakdown(facts: Facts) -> str:
    held = _serving(facts)
    parts = {
        "weights": held.weights_bytes,
        "standby": held.standby_bytes,
        "KV": held.kv_bytes,
        "step": held.step_bytes,
        "runtime": held.runtime_bytes,
    }
    each = ", ".join(f"{name} {part / 1e9:.2f}" for name, part in parts.items())
    return f"in serving {facts.working.name} hold {held.total_bytes / 1e9:.1f} GB ({each})"


def memory_share(facts: Facts) -> Judgement:
    right = facts.number("memory.total_gb") / facts.number("hardware.memory_gb")
    return judge(facts.number("memory.share"), right, "", remark="memory.total_gb / hardware.memory_gb")


def headroom(facts: Facts) -> Judgement:
    if facts.given("memory.share"):
        right = 1 - facts.number("memory.share")
    else:
        right = 1 - facts.number("memory.total_gb") / facts.number("hardware.memory_gb")
    remark = f"it is room for KV: {_most_sequences(facts):,} sequences of {facts.longest:,} tokens in all"
    return judge(facts.number("memory.headroom_share"), right, "", remark=remark)


def _most_sequences(facts: Facts) -> int:
    token_bytes = kv_gpu_token_bytes(facts.working.spec, facts.precision, facts.deployment)
    per_replica = max_kv_tokens(facts.system, _serving(facts), token_bytes)
    return facts.deployment.num_replicas * per_replica // facts.longest


def peak_memory(facts: Facts) -> Judgement:
    """In serving the KV pool is fixed: the peak is what is held all the time."""
    total = facts.number("memory.total_gb")

    def formulas() -> Iterator[Formula]:
        for name in _PARTS:
            if facts.given(f"memory.{name}"):
                part = facts.number(f"memory.{name}")
                for times in range(1, _MOST_TIMES + 1):
                    text = f"{number(total)} + {times} x memory.{name}, as a backward pass might need"
                    yield Formula(text, total + times * part, "serving, which has none: a fixed pool, no peak")

    return judge(facts.number("memory.peak_gb"), total, "GB", formulas(), none="a fixed KV pool has no peak")


def kv_cache(facts: Facts) -> Judgement:
    """The one cost of serving that grows with what is asked."""
    cases = f"{facts.batch} sequences of {facts.longest:,} tokens"
    models = distinct([facts.working, facts.as_declared])
    held = {sized.name: facts.kv_bytes(sized.spec, facts.batch, facts.longest) for sized in models}
    right = held[facts.working.name]
    if facts.given("memory.kv_gb"):
        formulas = in_gb(f"{cases}, every KV head on every GPU", right * facts.deployment.tp, "layout.tp")
        for sized in models:
            against = "" if sized == facts.working else "model.total_params_b"
            formulas += in_gb(f"{cases}, {sized.name}", held[sized.name], against)
        return judge(facts.number("memory.kv_gb"), right / 1e9, "GB", formulas, remark=cases)
    sizes = "; ".join(f"{name}: {gb(num)}" for name, num in held.items())
    reading = (
        f"{cases} ({sizes}; with four heads to a KV head a quarter); {_most_sequences(facts):,} such sequences fit"
    )
    return Judgement("nothing", gb(right), "missing", reading)


CHECKS = (
    Check("expert memory", "memory.expert_gb", expert_memory),
    Check("attention memory", "memory.attention_gb", attention_memory),
    Check("activations", "memory.activation_gb", activations),
    Check("optimizer", "memory.optimizer_gb", optimizer),
    Check("total memory", "memory.total_gb", total_memory),
    Check("share of memory", "memory.share", memory_share),
    Check("KV cache", "memory.kv_gb", kv_cache, speaks_up=True),
    Check("peak memory", "memory.peak_gb", peak_memory),
    Check("headroom", "memory.headroom_share", headroom),
)

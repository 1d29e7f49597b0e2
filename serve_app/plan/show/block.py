"""What a plan says of the chosen layout, as lines: a word, and what there is to say of it."""

from collections.abc import Iterator

from serve_app.plan.answer import Answer
from serve_app.plan.deployment import Deployment
from serve_app.plan.show import words
from serve_app.plan.show.lost import Loss, losses_told
from serve_app.plan.system import Interval, is_calibrated

Line = tuple[str, str]


def block(answer: Answer) -> Iterator[Line]:
    """In the order that a document would be checked in. A word is there once; further lines of it have none."""
    yield from _asked(answer)
    yield from _layout(answer)
    yield from _memory(answer)
    yield from _bounds(answer)
    yield from _ttft(answer)
    yield from _load(answer)
    yield from _loss(answer)
    yield from _availability(answer)
    yield from _admission(answer)
    yield from _better(answer)


# -- what was asked ----------------------------------------------------------------------------------------------------


def _asked(answer: Answer) -> Iterator[Line]:
    question, params = answer.question, answer.params
    spec, precision, declared = question.spec, question.precision, question.declared_params_b
    compared = ""
    if declared is not None:
        compared = f" (declared {declared:g} B: {words.changed(params.total / 1e9 / declared)})"
    of = "dense" if spec.is_dense else f"top-{spec.top_k} of {spec.num_experts}"
    yield (
        "model",
        f"{question.model}: {words.billions(params.total)} parameters{compared}, {words.billions(params.active)}"
        f" active ({of})",
    )
    parts = [
        f"experts {words.billions(params.experts)}",
        f"attention {words.billions(params.attention)}",
        f"embedding {words.billions(params.embedding)}",
    ]
    dtypes = {precision.weights, precision.experts, precision.kv, precision.compute}
    held = precision.weights if len(dtypes) == 1 else _dtypes(answer)
    yield "", f"{spec.num_layers} layers; {', '.join(parts)}; {held}"
    system = question.system
    yield (
        "system",
        f"{system.name}: {system.peak_flops(precision.compute) / 1e12:g} TFLOP/s, {system.memory_gb:g} GB,"
        f" {system.memory_gb_s:,g} GB/s; {system.gpus_per_node} GPUs a node, {system.intra_gb_s:g} GB/s within,"
        f" {system.inter_gb_s:g} between nodes",
    )
    yield "", f"from: {system.source}"
    workload = question.workload
    yield (
        "workload",
        f"prompts of {words.lengths(workload.isl)}, answers of {words.lengths(workload.osl)}, {words.load(workload)};"
        f" {_objective(answer)}",
    )
    if question.assumed:
        yield "", "taken, since nobody said it: " + " ".join(f"{option} {value}" for option, value in question.assumed)


def _dtypes(answer: Answer) -> str:
    one = answer.question.precision
    return f"weights {one.weights}, experts {one.experts}, KV {one.kv}, products in {one.compute}"


def _objective(answer: Answer) -> str:
    objective, parts = answer.question.workload.objective, []
    if objective.ttft_s is not None:
        parts.append(f"99 of 100 first tokens within {words.duration(objective.ttft_s)}")
    if objective.tpot_ms is not None:
        parts.append(f"{objective.tpot_ms:g} ms a token")
    if objective.recovery_s is not None:
        parts.append(f"streams stand still for {words.duration(objective.recovery_s)} at most")
    if objective.availability is not None:
        parts.append(f"kept {objective.availability:.6g} of the time")
    if objective.prefill_tokens_ms is not None:
        parts.append(f"prefill {objective.prefill_tokens_ms:g} tokens/ms on a GPU")
    return f"objective: {', '.join(parts)}" if parts else "no objective"


# -- layout, memory ----------------------------------------------------------------------------------------------------


def _layout(answer: Answer) -> Iterator[Line]:
    deployment, spec = answer.deployment, answer.question.spec
    slots = deployment.slots(spec)
    spares = f", {deployment.spares} spares of each cell among them" if deployment.spares else ""
    yield (
        "layout",
        f"{deployment}: {words.num(deployment.num_gpus, 'GPU')}{spares}; {words.num(slots.primary, 'expert')} +"
        f" {words.num(slots.standby, 'free slot')} on each GPU",
    )
    yield "", _meaning(deployment)
    for note in answer.chosen.notes:
        yield "", note
    for miss in answer.chosen.misses:
        yield "", f"misses the objective: {miss}"


def _meaning(deployment: Deployment) -> str:
    cells = "one cell of" if deployment.cells == 1 else f"{deployment.cells} cells, each of"
    replicas = words.num(deployment.dp, "replica")
    return (
        f"{cells} {words.num(deployment.pp, 'stage')} x {replicas} x {words.num(deployment.tp, 'shard')}; a stage's"
        f" experts are spread over {words.num(deployment.ep, 'GPU')} (EP = TP x DP)"
    )


def _memory(answer: Answer) -> Iterator[Line]:
    held, system, found = answer.estimate.footprint, answer.question.system, answer.estimate
    share = held.total_bytes / 1e9 / system.memory_gb
    yield (
        "memory",
        f"{words.gb(held.total_bytes)} of {system.memory_gb:g} GB on the fullest GPU ({words.percent(share)}): weights"
        f" {words.gb(held.weights_bytes)}, standby slots {words.gb(held.standby_bytes)}, KV {words.gb(held.kv_bytes)},"
        f" a step {words.gb(held.step_bytes)}, the process {words.gb(held.runtime_bytes)}",
    )
    most = answer.question.workload.most_tokens
    yield (
        "",
        f"room for {found.max_sequences:,} sequences of {most:,} tokens in {words.percent(system.memory_share)} of it",
    )


# -- bounds ------------------------------------------------------------------------------------------------------------


def _bounds(answer: Answer) -> Iterator[Line]:
    question, bounds, num = answer.question, answer.bounds, answer.sequences
    told = question.told_lengths
    rates = ", ".join(f"{words.digits(bounds.prefill_tokens_ms(length))} @{length:,}" for length in told)
    yield "prefill", f"at most {rates} tokens of a prompt: tokens/ms on each GPU"
    if (wanted := question.told_prefill_tokens_ms) is not None:
        longest = bounds.longest_prompt_at(wanted)
        holds = f"for prompts of up to {longest:,} tokens" if longest else "for no prompt"
        yield "", f"{wanted:g} tokens/ms are required, and reached {holds}"
    rates = ", ".join(f"{words.digits(bounds.decode_tokens_ms(num, length))} @{length:,}" for length in told)
    floors = " / ".join(words.digits(bounds.decode_round_s(num, length) * 1e3) for length in told)
    yield "decode", f"at most {rates} tokens of context: tokens/ms on each GPU, with {num:,} sequences at a time"
    yield "", f"a sequence has a token every {floors} ms at best"


def _ttft(answer: Answer) -> Iterator[Line]:
    bounds, found, longest = answer.bounds, answer.estimate, answer.question.workload.isl.most
    yield (
        "TTFT",
        f"a prompt of {longest:,} tokens alone: {words.duration(bounds.alone_s(longest))} of products, uncut through"
        f" all stages; in chunks, with links and memory traffic, the mean prompt is expected to take"
        f" {words.duration(found.idle_ttft_s)}",
    )
    at_once = words.duration(bounds.at_once_s(answer.sequences, longest))
    yield "", f"{answer.sequences:,} at once: {at_once} at least until the last has its first token"


# -- under load --------------------------------------------------------------------------------------------------------


def _load(answer: Answer) -> Iterator[Line]:
    found, system = answer.estimate, answer.question.system
    yield (
        "load",
        f"with {words.digits(found.concurrency)} sequences at a time: {words.digits(found.rate)} requests/s,"
        f" {words.digits(found.output_tokens_s)} output tokens/s ({words.digits(found.output_tokens_s_gpu)} on each"
        f" GPU)",
    )
    yield "", f"TTFT {words.span(found.ttft_s)} in the mean, 99 of 100 within {words.span(found.ttft_p99_s)}"
    yield "", f"TPOT {words.span(found.tpot_s)}: from a token of an answer to the next"
    if found.is_overloaded:
        yield "", "that is more than it can take: requests wait without end, or for a place"
    yield "", _capacity(answer)
    yield (
        "",
        f"in brackets, where nine of ten measurements lay: TTFT {_interval(system.ttft_interval)}, TPOT"
        f" {_interval(system.tpot_interval)}",
    )
    yield "", _source(is_calibrated(system))


def _capacity(answer: Answer) -> str:
    found = answer.estimate
    if not found.capacity or found.capacity_sequences is None:
        return "not even a single request keeps the objective"
    return (
        f"up to {words.digits(found.capacity)} requests/s with the objective kept, at"
        f" {words.digits(found.capacity_sequences)} sequences at a time"
    )


def _interval(interval: Interval) -> str:
    return f"{interval.low:g} to {interval.high:g} times the prediction"


def _source(calibrated: bool) -> str:
    if calibrated:
        return "as nine of ten measurements of this hardware were (`octavo calibrate`)"
    return (
        "wide: so public runs of other engines were, nothing of ours on this hardware; `octavo calibrate` narrows them"
    )


# -- losses ------------------------------------------------------------------------------------------------------------


def _loss(answer: Answer) -> Iterator[Line]:
    of = list(losses_told(answer))
    one = next(loss for loss in of if loss.state.kind == "gpu")
    yield "N-1", f"{_slots(one)}; {_blast(one)}"
    yield "", _after(answer, one)
    if phases := ", ".join(f"{phase.name} {words.duration(phase.seconds)}" for phase in one.budget.failover):
        yield "", f"streams flow again after {words.duration(one.budget.all_streams_s)}: {phases}"
    yield "", _recovery(answer)
    two = [loss for loss in of if loss.state.kind.startswith("two")]
    for loss, word in zip(two, ["N-2", "", ""], strict=False):
        yield word, f"{loss.name}: {_slots(loss)}; {_outcome(loss)}"
    for loss in of:
        if loss.state.kind == "node":
            yield "node", f"{words.num(len(loss.state.gpus), 'GPU')}: {_slots(loss)}; {_outcome(loss)}"


def _slots(loss: Loss) -> str:
    if loss.slots_needed is None:
        return "nobody is left in a stage to hold its experts"
    verdict = "they fit" if loss.state.fits_slots else "they do not fit"
    return f"experts need {loss.slots_needed} slots on each GPU left, {loss.slots_present} are there: {verdict}"


def _blast(loss: Loss) -> str:
    state = loss.state
    return f"{words.num(state.blast_gpus, 'GPU')} stand still until they have homes, then {state.blast_gpus_after} rest"


def _outcome(loss: Loss) -> str:
    state = loss.state
    if not state.is_survivable:
        return "nothing serves until a seat is filled"
    kept = "objective kept" if state.keeps_objective else "objective not kept"
    return (
        f"capacity {words.percent(state.share_at_once)} at once, {words.percent(state.share)} after"
        f" {words.duration(loss.budget.all_streams_s)}, {kept}"
    )


def _after(answer: Answer, loss: Loss) -> str:
    state = loss.state
    if not state.is_survivable:
        return "nothing serves until its seat is filled"
    healthy = answer.estimate.capacity
    kept = "kept" if state.keeps_objective else "not kept"
    whole = "" if not healthy else f" of {words.digits(healthy)} requests/s"
    at_once = "" if state.at_once_s is None else f", {words.duration(state.at_once_s)} for the last of all at once"
    return (
        f"capacity {words.percent(state.share_at_once)} at once, then {words.percent(state.share)}{whole}; objective"
        f" {kept}: TTFT {words.duration(state.degraded.ttft_p99_s.value)} for 99 of 100{at_once}"
    )


def _recovery(answer: Answer) -> str:
    process_s, gpu_s = answer.restart.whole_s, answer.recovery.whole_s
    return (
        f"capacity is whole again after {words.duration(process_s)} where only a process died, and after"
        f" {words.duration(gpu_s)} where the GPU is broken"
        + (": a spare takes its seat" if answer.deployment.spares else ": it is taken to be replaced in that time")
    )


def _availability(answer: Answer) -> Iterator[Line]:
    found, known = answer.availability, answer.question.system.recovery
    yield (
        "available",
        f"objective kept {words.share_of_time(found.kept)} of the time: a GPU fails every"
        f" {words.duration(found.failure_h * 3600)} (each after {known.mtbf_h:,.0f} h in the mean, replaced in"
        f" {known.replace_h:g} h), pause {words.duration(found.pause_s)}",
    )
    target = answer.question.workload.objective.availability
    if target is not None:
        needed = answer.spares_needed
        word = "no number of spares does that" if needed is None else f"needs {words.num(needed, 'spare')} in each cell"
        yield "", f"{target:.6g} of the time {word}; it has {answer.deployment.spares}"


def _admission(answer: Answer) -> Iterator[Line]:
    bounds, dp = answer.bound_tokens, answer.deployment.dp
    if not bounds:
        return
    planned = answer.budgets
    cells = "" if answer.deployment.cells == 1 else " in each cell"
    less = ""
    if dp > 1:
        less = f"; with a replica lost {words.tokens(planned[dp - 1])} ({words.tokens(bounds[dp - 1])})"
    yield (
        "admission",
        f"{words.tokens(planned[dp])} prompt tokens may wait{cells}, beside answers that run;"
        f" {words.tokens(bounds[dp])} is what the hardware allows at most{less}",
    )


def _better(answer: Answer) -> Iterator[Line]:
    better = answer.better
    if better is None:
        return
    found, ours = better.estimate, answer.estimate
    gained = words.changed(found.output_tokens_s_gpu / ours.output_tokens_s_gpu) if ours.output_tokens_s_gpu else "more"
    cell, num = better.deployment.cell_gpus, better.deployment.num_gpus
    yield (
        "better",
        f"{better.deployment}: {gained} output tokens/s, {words.gb(found.footprint.total_bytes)} GB,"
        f" blast radius {words.num(cell, 'GPU')} ({words.percent(cell / num)})",
    )

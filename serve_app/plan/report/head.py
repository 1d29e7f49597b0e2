"""What was asked and what is answered, in a paragraph; and the answer beside a better one, figure by figure."""

from collections.abc import Iterator

from serve_app.plan.answer import Answer, losses_of
from serve_app.plan.availability import availability
from serve_app.plan.recovery import budget
from serve_app.plan.report.figures import gb, nines, number, percent, plural, spanned, time
from serve_app.plan.report.markup import Html, join, section, table, tag, text
from serve_app.plan.report.speed import speed
from serve_app.plan.report.words import asked, layout, promised
from serve_app.plan.search import Candidate, Miss
from serve_app.plan.workload import Objective


def head(answer: Answer) -> Html:
    question = answer.question
    return tag(
        "header",
        tag("p", "Octavo plan", class_="over"),
        tag("h1", f"{question.model} on {plural(answer.deployment.num_gpus, 'GPU')} of {question.system.name}"),
        _verdict(question.workload.objective, answer.chosen.misses),
        tag("p", join(_sentences(answer), " "), class_="lead"),
        tag("div", *_tiles(answer), class_="tiles"),
    )


def _verdict(objective: Objective, misses: tuple[Miss, ...]) -> Html:
    """Sign and words, so that its colour says nothing by itself."""
    if misses:
        return tag("p", "✕ Objective not kept: ", " and ".join(map(str, misses)), class_="verdict bad")
    if not promised(objective):
        return tag("p", "No objective was asked for", class_="verdict")
    return tag("p", "✓ Objective kept", class_="verdict good")


def _sentences(answer: Answer) -> Iterator[Html]:
    question, deployment, found = answer.question, answer.deployment, answer.estimate
    spec, precision, params, system = question.spec, question.precision, answer.params, question.system
    experts = f"{plural(spec.num_experts, 'expert')} each, of which a token meets {spec.top_k}"
    yield join([tag("b", question.model), f" has {params.total / 1e9:.3g} B parameters, {params.active / 1e9:.3g} B"])
    yield text(
        f"of them active, in {plural(spec.num_layers, 'layer')} with {experts};"
        f" weights are {precision.weights}, experts {precision.experts}, KV {precision.kv}."
    )
    yield join(
        [
            "Each GPU of ",
            tag("b", system.name),
            f" has {number(system.memory_gb)} GB at {number(system.memory_gb_s)} GB/s and computes"
            f" {number(system.peak_flops(precision.compute) / 1e12)} TFLOP/s at most in {precision.compute};"
            f" {system.gpus_per_node} are a node.",
        ]
    )
    wish = promised(question.workload.objective)
    yield text(f"Asked for are {asked(question.workload)}" + (f", and {wish}." if wish else "."))
    why = "The layout that was named" if question.layout is not None else "The best layout that was found"
    yield join([f"{why}, ", tag("b", layout(deployment)), ","])
    yield text(
        f"gives {number(found.output_tokens_s_gpu)} output tokens/s per GPU; the first token comes after"
        f" {time(found.ttft_s.value)} in the mean and {time(found.ttft_p99_s.value)} for the slowest of a hundred."
    )
    if answer.found.nearest:
        yield text(answer.found.nearest)
    if answer.better is not None:
        yield _better(answer, answer.better)


def _better(answer: Answer, better: Candidate) -> Html:
    measure = speed(answer.question.workload)
    mine, its = measure.of(answer.chosen), measure.of(better)
    stop, instead = better.deployment.cell_gpus, answer.deployment.cell_gpus
    stops = plural(stop, "GPU") + (f" instead of {number(instead)}" if stop != instead else ", as many as here")
    gain = f" ({100 * (its / mine - 1):+.0f} %)" if mine > 0 else ""
    return join(
        [
            "The search puts ",
            tag("b", layout(better.deployment)),
            f" first: {number(its)} {measure.unit} instead of {number(mine)}{gain}, and the loss of one GPU"
            f" stops {stops}.",
        ]
    )


def _tiles(answer: Answer) -> Iterator[Html]:
    found, loss, system = answer.estimate, answer.losses.gpu, answer.question.system
    room = system.memory_share * system.memory_gb * 1e9
    for name, value, below in (
        ("Throughput per GPU", f"{number(found.output_tokens_s_gpu)}", "output tokens/s"),
        ("TTFT p99", time(found.ttft_p99_s.value), f"mean {time(found.ttft_s.value)}"),
        ("Between tokens", time(found.tpot_s.value), "mean"),
        ("Fullest GPU", gb(found.footprint.total_bytes), f"of {gb(room)} that may be filled"),
        (
            "Capacity after one loss",
            percent(loss.share),
            f"{percent(loss.share_at_once)} at once; {plural(loss.blast_gpus, 'GPU')} stop",
        ),
        (
            "Streams go on after",
            time(answer.recovery.first_token_s),
            f"all after {time(answer.recovery.all_streams_s)}",
        ),
    ):
        yield tag("div", tag("span", name), tag("b", value), tag("small", below))


# -- figure by figure -----------------------------------------------------------------------------------------------


def compared(answer: Answer) -> Html:
    """The answer and, where there is one, what the search puts before it."""
    which = [answer.chosen] if answer.better is None else [answer.chosen, answer.better]
    columns = [dict(_figures(answer, candidate)) for candidate in which]
    heads = ["figure", "chosen" if answer.question.layout is None else "named", "first of the search"][: len(which) + 1]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    note = tag(
        "p",
        "In brackets: where nine of ten measurements are expected. Losses are those of the worst GPU, with the"
        " objective kept.",
        class_="note",
    )
    return section("figures", "Figures", table("What is expected", heads, rows), note)


def _figures(answer: Answer, candidate: Candidate) -> Iterator[tuple[str, str]]:
    deployment, found, workload = candidate.deployment, candidate.estimate, answer.question.workload
    lost = losses_of(candidate, answer.question)
    took = budget(lost.gpu)
    capacity = found.capacity or 0.0
    yield "layout", layout(deployment)
    yield "output tokens/s per GPU", number(found.output_tokens_s_gpu)
    yield "output tokens/s", number(found.output_tokens_s)
    yield "prompt tokens/s", number(found.prompt_tokens_s)
    yield "requests/s", number(found.rate)
    yield "requests/s with the objective kept", number(capacity)
    yield "time to first token, mean", spanned(found.ttft_s)
    yield "time to first token, p99", spanned(found.ttft_p99_s)
    yield "time between tokens", spanned(found.tpot_s)
    yield "sequences at a time", f"{number(round(found.concurrency))} of {number(found.max_sequences)} that have room"
    yield "held by the fullest GPU", gb(found.footprint.total_bytes)
    yield "GPUs that stop when one is lost", number(lost.blast_gpus)
    yield "requests/s at that moment", f"{number(lost.worst_capacity)} ({percent(lost.gpu.share_at_once)})"
    yield "requests/s until its seat is filled", f"{number(lost.degraded_capacity)} ({percent(lost.gpu.share)})"
    yield "first stream goes on after", time(took.first_token_s)
    yield "all streams go on after", time(took.all_streams_s)
    yield "time with the objective kept", nines(availability(lost, workload, found).kept)

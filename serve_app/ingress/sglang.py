"""`POST /generate` as SGLang speaks it: `text`, `input_ids` or (our addition) `messages`; one prompt or a list.

Where SGLang refuses, this refuses with the same status and shape (`{"error": {"message": ...}}`), and adds the
field's name. The events of a stream carry all text and tokens so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from serve_app.engine.request import Grammar, SamplingParams
from serve_app.errors import OctavoError
from serve_app.ingress.body import decode
from serve_app.ingress.client import EngineUnavailableError
from serve_app.ingress.door import (
    LEAST_REPETITION_PENALTY,
    MAX_SEED,
    MAX_TOP_LOGPROBS,
    Door,
    Job,
    Prompt,
    in_range,
    new_job,
    refuse_unsupported,
    require,
    seed,
    short,
    temperature,
)
from serve_app.ingress.faults import (
    AbortedError,
    BadInputError,
    BodyTooLargeError,
    RefusedError,
    TakenOverError,
    TimedOutError,
)
from serve_app.ingress.output import Finish, Output, Piece
from serve_app.ingress.sse import Progress, Ticket, sse_event

PROMPT_FIELDS = frozenset({"text", "input_ids", "messages"})
DEFAULT_NEW_TOKENS = 128

_Message = dict[str, Any]


class SglangSampling(msgspec.Struct, forbid_unknown_fields=True):
    """`sampling_params` as written. Null is unset. See NEUTRAL_SAMPLING for those that must stay neutral."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    sampling_seed: int | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: Any = None
    stop_regex: Any = None
    logit_bias: dict[str, float] | None = None
    custom_params: Any = None


class SglangFields(msgspec.Struct, forbid_unknown_fields=True):
    """The body as written. Null is unset. See NEUTRAL for those that must stay neutral."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    messages: list[_Message | list[_Message]] | None = None
    sampling_params: SglangSampling | list[SglangSampling] | None = None
    rid: str | list[str] | None = None
    stream: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    token_ids_logprob: Any = None
    return_text_in_logprobs: bool | None = None
    return_hidden_states: bool | None = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    input_embeds: Any = None
    lora_path: Any = None
    session_params: Any = None
    custom_logit_processor: Any = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logprob_start_len": (-1,),
    "token_ids_logprob": (),
    "return_text_in_logprobs": (False,),
    "return_hidden_states": (False,),
    "image_data": (),
    "video_data": (),
    "audio_data": (),
    "input_embeds": (),
    "lora_path": (),
    "session_params": (),
    "custom_logit_processor": (),
}
NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = {
    "spaces_between_special_tokens": (True,),
    "no_stop_trim": (False,),
    "structural_tag": (),
    "stop_regex": (),
    "custom_params": ({},),
}


def parse(body: bytes, door: Door, ticket: Ticket) -> "SglangCall":
    """Validate and tokenize. Raises BadInputError."""
    fields = decode(body, SglangFields)
    refuse_unsupported(fields, NEUTRAL)
    name, raw_prompts, is_list = _raw_prompts(fields)
    door.check_count(len(raw_prompts), name)
    samplings = _samplings(fields.sampling_params, len(raw_prompts))
    counts = [_num_copies(sampling, path) for sampling, path in samplings]
    door.check_count(sum(counts), "sampling_params.n")
    num_top = _num_top(fields)
    names = _given_rids(fields.rid, door.limits.max_rid_chars) or door.name(ticket)
    rids = _rids(names, counts)
    jobs: list[Job] = []
    for i, raw in enumerate(raw_prompts):
        prompt = _prompt(door, raw, f"{name}[{i}]" if is_list else name)
        jobs += _jobs(door, prompt, samplings[i], rids[i], logprobs=bool(fields.return_logprob), num_top=num_top)
    name = names if isinstance(names, str) else names[0]
    progress = ticket.progress(len(jobs))
    return SglangCall(name, jobs, bool(fields.stream), progress, is_single=not is_list and len(jobs) == 1)


def _num_top(fields: SglangFields) -> int:
    """Without `return_logprob` the number says nothing."""
    num = fields.top_logprobs_num or 0
    in_range(num, 0, MAX_TOP_LOGPROBS, "top_logprobs_num")
    return num if fields.return_logprob else 0


def _raw_prompts(fields: SglangFields) -> tuple[str, list[Any], bool]:
    """Name of the prompt's field, the prompts in it, and whether they came as a list."""
    given = [name for name in sorted(PROMPT_FIELDS) if getattr(fields, name) is not None]
    require(len(given) == 1, " and ".join(given) or "text", "exactly one of text, input_ids, messages is needed")
    name = given[0]
    value = getattr(fields, name)
    if isinstance(value, str):
        return name, [value], False
    require(bool(value), name, "empty")
    num_lists = sum(isinstance(item, list) for item in value)
    require(num_lists in {0, len(value)}, name, "either one prompt or a list of prompts, not a mixture")
    is_list = name == "text" or num_lists > 0
    return name, value if is_list else [value], is_list


def _samplings(
    given: SglangSampling | list[SglangSampling] | None, num_prompts: int
) -> list[tuple[SglangSampling, str]]:
    """One per prompt, with the path that error messages give it."""
    if not isinstance(given, list):
        return [(given or SglangSampling(), "sampling_params.")] * num_prompts
    require(len(given) == num_prompts, "sampling_params", f"{len(given)} of them for {num_prompts} prompts")
    return [(sampling, f"sampling_params[{i}].") for i, sampling in enumerate(given)]


def _num_copies(sampling: SglangSampling, path: str) -> int:
    num = 1 if sampling.n is None else sampling.n
    require(num >= 1, f"{path}n", f"must be at least 1, not {short(num)}")
    return num


def _given_rids(given: str | list[str] | None, max_chars: int) -> str | list[str] | None:
    """The body's names, checked one by one."""
    if given is not None:
        names = [given] if isinstance(given, str) else given
        require(bool(names) and all(names), "rid", "empty")
        require(max(map(len, names)) <= max_chars, "rid", f"longer than {max_chars} characters")
    return given


def _rids(given: str | list[str], counts: list[int]) -> list[list[str]]:
    """Names for each prompt's copies: as given, numbered where one name stands for several sequences."""
    if isinstance(given, str):
        given = [given] if len(counts) == 1 else [f"{given}_{i}" for i in range(len(counts))]
    require(len(given) == len(counts), "rid", f"{len(given)} of them for {len(counts)} prompts")
    rids = [
        [rid] if count == 1 else [f"{rid}_{j}" for j in range(count)] for rid, count in zip(given, counts, strict=True)
    ]
    flat = [rid for copies in rids for rid in copies]
    require(len(set(flat)) == len(flat), "rid", "given twice")
    return rids


def _prompt(door: Door, raw: Any, name: str) -> Prompt:
    if isinstance(raw, str):
        return door.prompt_of_text(raw, name)
    if raw and isinstance(raw[0], dict):
        return door.prompt_of_messages(raw, name)
    return door.prompt_of_ids(raw, name)


def _jobs(
    door: Door, prompt: Prompt, given: tuple[SglangSampling, str], rids: list[str], *, logprobs: bool, num_top: int
) -> list[Job]:
    """One job per copy. Copies differ in their seed only."""
    fields, path = given
    sampling = _sampling(door, prompt, fields, path)
    sampling = msgspec.structs.replace(sampling, logprobs=logprobs, top_logprobs=num_top)
    stops = door.stops(fields.stop, f"{path}stop")
    skip_special = fields.skip_special_tokens is not False
    first_seed = seed(fields.sampling_seed, rids[0], f"{path}sampling_seed")
    return [
        new_job(
            rid,
            prompt,
            msgspec.structs.replace(sampling, seed=(first_seed + copy) & MAX_SEED),
            stops,
            skip_special_tokens=skip_special,
        )
        for copy, rid in enumerate(rids)
    ]


def _sampling(door: Door, prompt: Prompt, fields: SglangSampling, path: str) -> SamplingParams:
    refuse_unsupported(fields, NEUTRAL_SAMPLING, path)
    max_new = door.budget_tokens(prompt, fields.max_new_tokens, DEFAULT_NEW_TOKENS, f"{path}max_new_tokens")
    min_new = fields.min_new_tokens or 0
    require(0 <= min_new <= max_new, f"{path}min_new_tokens", f"must be in [0, {max_new}], not {short(min_new)}")
    top_p = 1.0 if fields.top_p is None else fields.top_p
    in_range(top_p, 0.0, 1.0, f"{path}top_p", open_low=True)
    min_p = fields.min_p or 0.0
    in_range(min_p, 0.0, 1.0, f"{path}min_p")
    top_k = -1 if fields.top_k is None else fields.top_k
    require(top_k >= -1, f"{path}top_k", f"must be -1 (all) or positive, not {short(top_k)}")
    return SamplingParams(
        max_new_tokens=max_new,
        min_new_tokens=min_new,
        temperature=temperature(1.0 if fields.temperature is None else fields.temperature, f"{path}temperature"),
        top_k=door.top_k(top_k),
        top_p=top_p,
        min_p=min_p,
        stop_token_ids=door.stop_token_ids(fields.stop_token_ids or (), f"{path}stop_token_ids"),
        ignore_eos=bool(fields.ignore_eos),
        frequency_penalty=_penalty(fields.frequency_penalty, f"{path}frequency_penalty"),
        presence_penalty=_penalty(fields.presence_penalty, f"{path}presence_penalty"),
        repetition_penalty=_repetition_penalty(fields.repetition_penalty, f"{path}repetition_penalty"),
        logit_bias=door.logit_bias(fields.logit_bias or {}, f"{path}logit_bias"),
        grammar=_grammar(door, fields, path),
    )


def _penalty(given: float | None, name: str) -> float:
    penalty = given or 0.0
    in_range(penalty, -2.0, 2.0, name)
    return penalty


def _repetition_penalty(given: float | None, name: str) -> float:
    penalty = 1.0 if given is None else given
    in_range(penalty, LEAST_REPETITION_PENALTY, 2.0, name)
    return penalty


def _grammar(door: Door, fields: SglangSampling, path: str) -> Grammar | None:
    given = [path + name for name in ("json_schema", "regex", "ebnf") if getattr(fields, name) is not None]
    require(len(given) <= 1, " and ".join(given), "only one of them can be kept")
    if fields.json_schema is not None:
        return door.grammar("json_schema", fields.json_schema, f"{path}json_schema")
    if fields.regex is not None:
        return door.grammar("regex", fields.regex, f"{path}regex")
    return None if fields.ebnf is None else door.gbnf(fields.ebnf, f"{path}ebnf")


class SglangMeta(msgspec.Struct, omit_defaults=True):
    id: str
    finish_reason: dict[str, Any] | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    output_token_logprobs: list[tuple[float | None, int, None]] | msgspec.UnsetType = msgspec.UNSET
    output_top_logprobs: list[list[tuple[float, int, None]]] | msgspec.UnsetType = msgspec.UNSET


class SglangAnswer(msgspec.Struct, omit_defaults=True):
    text: str
    output_ids: list[int]
    meta_info: SglangMeta
    index: int | msgspec.UnsetType = msgspec.UNSET  # in streams of several sequences


_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class SglangCall:
    """A validated request. Its answers and events are SGLang's."""

    name: str
    jobs: Sequence[Job]
    stream: bool
    progress: Progress
    is_single: bool
    end: bytes = sse_event(b"[DONE]")

    def answer(self, outputs: list[Output]) -> bytes:
        answers = [self._answer(job, output) for job, output in zip(self.jobs, outputs, strict=True)]
        return _encode(answers[0] if self.is_single else answers)

    def events(self, index: int, output: Output, pieces: list[Piece]) -> bytes:
        num_tokens = len(output.tokens)
        if not self.progress.is_news(index, num_tokens, is_end=output.finish is not None):
            return b""
        answer = self._answer(self.jobs[index], output)
        if not self.is_single:
            answer.index = index
        return sse_event(_encode(answer), self.progress.advance(index, num_tokens))

    def _answer(self, job: Job, output: Output) -> SglangAnswer:
        meta = SglangMeta(
            id=job.rid,
            finish_reason=_finish_reason(output.finish, len(output.tokens)),
            prompt_tokens=len(job.request.prompt),
            completion_tokens=len(output.tokens),
            cached_tokens=output.num_cached_tokens,
        )
        if job.request.sampling.logprobs:
            meta.output_token_logprobs = [(piece.logprob, piece.token, None) for piece in output.pieces]
        if job.request.sampling.top_logprobs:
            meta.output_top_logprobs = [[(value, token, None) for token, value in piece.top] for piece in output.pieces]
        return SglangAnswer(output.text, output.tokens, meta)


def _finish_reason(finish: Finish | None, num_tokens: int) -> dict[str, Any] | None:
    match finish:
        case None:
            return None
        case Finish("stop", matched):
            return {"type": "stop", "matched": matched}
        case Finish("length"):
            return {"type": "length", "length": num_tokens}
    return {"type": "abort", "message": "Aborted"}


def fault(error: OctavoError) -> tuple[int, bytes]:
    """HTTP status and JSON body: SGLang's, with the kind and the field added."""
    status, kind = _fault_kind(error)
    detail: dict[str, Any] = {"message": str(error), "type": kind, "code": status}
    if isinstance(error, BadInputError):
        detail["field"] = error.field
    return status, _encode({"error": detail})


def _fault_kind(error: OctavoError) -> tuple[int, str]:
    if isinstance(error, RefusedError):
        return error.status, "TooManyRequests" if error.status == 429 else "ServiceUnavailable"
    return next((fault for kind, fault in _FAULTS if isinstance(error, kind)), (500, "InternalServerError"))


_FAULTS: list[tuple[type[OctavoError], tuple[int, str]]] = [
    (BodyTooLargeError, (413, "PayloadTooLarge")),
    (BadInputError, (400, "BadRequest")),
    (EngineUnavailableError, (503, "ServiceUnavailable")),
    (TakenOverError, (409, "Conflict")),
    (AbortedError, (409, "Conflict")),
    (TimedOutError, (504, "Timeout")),
]

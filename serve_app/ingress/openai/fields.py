"""What chat and completions are asked in common: how tokens are chosen, how the answer is sent.

Fields are OpenAI's, then those that vLLM adds. A field that either documents and that this server does not have is
refused unless it asks for nothing; fields that only give hints are accepted and ignored; other names are refused.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from serve_app.engine.request import Grammar, SamplingParams
from serve_app.ingress.door import (
    LEAST_REPETITION_PENALTY,
    MAX_BIAS,
    MAX_SEED,
    Door,
    Job,
    Prompt,
    in_range,
    new_job,
    require,
    seed,
    temperature,
)
from serve_app.ingress.faults import BadInputError
from serve_app.ingress.openai.faults import ModelNotFoundError
from serve_app.ingress.sse import Ticket

MAX_COPIES = 128  # OpenAI's own limits, these two
MAX_TEMPERATURE = 2.0

Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Bias = Annotated[float, Meta(ge=-MAX_BIAS, le=MAX_BIAS)]
Hint = Any  # accepted and ignored


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Hint = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's: exactly one of them."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class CommonFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Null is unset."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_COPIES)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    temperature: Annotated[float, Meta(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_p: Fraction | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    max_tokens: Count | None = None
    user: Hint = None
    # vLLM's
    best_of: int | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Meta(ge=LEAST_REPETITION_PENALTY, le=100)] | None = None
    min_tokens: Natural | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    request_id: str | None = None
    priority: Hint = None
    include_stop_str_in_output: bool | None = None
    spaces_between_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    cache_salt: Any = None
    prompt_logprobs: Any = None
    truncate_prompt_tokens: Any = None
    logits_processors: Any = None
    kv_transfer_params: Any = None
    vllm_xargs: Any = None


HINTS = ("user", "priority")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "logits_processors": ([],),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
}


def check_model(door: Door, model: str | None) -> None:
    """No name means the one model that is there. Raises ModelNotFoundError for another's."""
    if model is not None and model != door.model.name:
        raise ModelNotFoundError(model, door.model.name)


def check_common(door: Door, fields: CommonFields) -> None:
    """What can be refused before a prompt is tokenized."""
    check_model(door, fields.model)
    require(fields.stream_options is None or bool(fields.stream), "stream_options", "only allowed when stream is true")
    if fields.best_of is not None:
        require(fields.best_of == (fields.n or 1), "best_of", "not supported by this server: leave it out")
    options = fields.stream_options
    require(not (options and options.continuous_usage_stats), "stream_options.continuous_usage_stats", "not supported")


def name_of(door: Door, ticket: Ticket, fields: CommonFields) -> str:
    """The request's name: the body's, the header's, or one made here."""
    if fields.request_id:
        ticket = ticket._replace(rid=fields.request_id)
    return door.name(ticket)


def sampling(
    door: Door,
    prompt: Prompt,
    fields: CommonFields,
    asked: tuple[str, int | None],
    default_tokens: int,
    top_logprobs: int | None,
    grammar: Grammar | None,
) -> SamplingParams:
    """How the engine is to choose. `asked` is the field that limits the tokens, and its value.

    `top_logprobs` is None where no log-probabilities are wanted. The seed is set for each copy: see `new_jobs`.
    """
    max_name, max_asked = asked
    max_new = door.budget_tokens(prompt, max_asked, default_tokens, max_name)
    in_range(fields.min_tokens or 0, 0, max_new, "min_tokens")
    top_p = 1.0 if fields.top_p is None else fields.top_p
    in_range(top_p, 0.0, 1.0, "top_p", open_low=True)
    return SamplingParams(
        max_new_tokens=max_new,
        min_new_tokens=fields.min_tokens or 0,
        temperature=temperature(1.0 if fields.temperature is None else fields.temperature, "temperature"),
        top_k=door.top_k(fields.top_k or 0),
        top_p=top_p,
        min_p=fields.min_p or 0.0,
        stop_token_ids=door.stop_token_ids(fields.stop_token_ids or (), "stop_token_ids"),
        ignore_eos=bool(fields.ignore_eos),
        logprobs=top_logprobs is not None,
        top_logprobs=top_logprobs or 0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        presence_penalty=fields.presence_penalty or 0.0,
        repetition_penalty=1.0 if fields.repetition_penalty is None else fields.repetition_penalty,
        logit_bias=door.logit_bias(fields.logit_bias or {}, "logit_bias"),
        grammar=grammar,
    )


def new_jobs(
    name: str,
    prompt: Prompt,
    params: SamplingParams,
    fields: CommonFields,
    stops: tuple[str, ...],
    *,
    skip_special_tokens: bool = True,
) -> list[Job]:
    """One job per copy. Copies differ in their seed only."""
    num_copies = fields.n or 1
    first_seed = seed(_unsigned(fields.seed), name, "seed")
    return [
        new_job(
            name if num_copies == 1 else f"{name}_{copy}",
            prompt,
            msgspec.structs.replace(params, seed=(first_seed + copy) & MAX_SEED),
            stops,
            skip_special_tokens=skip_special_tokens and fields.skip_special_tokens is not False,
        )
        for copy in range(num_copies)
    ]


def _unsigned(given: int | None) -> int | None:
    """OpenAI's seeds are signed."""
    return given & MAX_SEED if given is not None and -(1 << 63) <= given < 0 else given


def guided(door: Door, fields: CommonFields) -> Grammar | None:
    """vLLM's ways to say what the answer must be; None where none is used."""
    outputs = fields.structured_outputs or StructuredOutputs()
    given: dict[str, tuple[str, Any]] = {
        "guided_json": ("json", fields.guided_json),
        "guided_regex": ("regex", fields.guided_regex),
        "guided_choice": ("choice", fields.guided_choice),
        "guided_grammar": ("grammar", fields.guided_grammar),
        "structured_outputs.json": ("json", outputs.json),
        "structured_outputs.json_object": ("json", {"type": "object"} if outputs.json_object else None),
        "structured_outputs.regex": ("regex", outputs.regex),
        "structured_outputs.choice": ("choice", outputs.choice),
        "structured_outputs.grammar": ("grammar", outputs.grammar),
    }
    asked = [(name, form, value) for name, (form, value) in given.items() if value is not None]
    if not asked:
        return None
    require(len(asked) == 1, " and ".join(name for name, _, _ in asked), "only one of them can be kept")
    return _guide(door, *asked[0])


def _guide(door: Door, name: str, form: str, value: Any) -> Grammar:
    match form:
        case "json":
            return schema_grammar(door, value, name)
        case "choice":
            require(bool(value), name, "empty")
            return choice_grammar(door, value, name)
        case "regex":
            return door.grammar("regex", value, name)
    return door.gbnf(value, name)


def choice_grammar(door: Door, choices: list[str], name: str) -> Grammar:
    """One of these texts, as it stands."""
    alternatives = " | ".join(msgspec.json.encode(choice).decode() for choice in choices)
    require(all(choices), name, "a choice is empty")
    return door.grammar("lark", f"start: {alternatives}", name)


def schema_grammar(door: Door, schema: str | dict[str, Any] | bool, name: str) -> Grammar:
    """JSON of this schema. Raises BadInputError when it is none."""
    text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    return door.grammar("json_schema", text, name)


def one_grammar(*given: tuple[str, Grammar | None]) -> Grammar | None:
    """The one grammar that is asked for. Raises BadInputError where there are two."""
    asked = [(name, grammar) for name, grammar in given if grammar is not None]
    if len(asked) > 1:
        raise BadInputError(" and ".join(name for name, _ in asked), "only one of them can be kept")
    return asked[0][1] if asked else None

"""What /openapi.json says of `/generate`: two dialects, one route."""

from typing import Any

from serve_app.ingress import sglang, tgi
from serve_app.ingress.door import (
    LEAST_REPETITION_PENALTY,
    MAX_BIAS,
    MAX_BIASES,
    MAX_SEED,
    MAX_TEMPERATURE,
    MAX_TOP_LOGPROBS,
)
from serve_app.ingress.openapi.problems import GENERATE_ERRORS, FaultBody, TgiFaultBody, problems
from serve_app.ingress.openapi.schemas import (
    Schema,
    holds_tokens,
    narrow,
    narrow_to_neutral,
    one_of_them,
    schema_of,
    schemas_of,
)
from serve_app.ingress.openapi.words import (
    GENERATE_PARAMETERS,
    NAME_HEADER,
    event_stream,
    json_answer,
    request_body,
)
from serve_app.ingress.sglang import SglangAnswer, SglangFields, SglangSampling
from serve_app.ingress.tgi import TgiAnswer, TgiEvent, TgiFields, TgiParameters

TOKEN_NAMES: Schema = {"propertyNames": {"type": "string", "pattern": "^[0-9]{1,9}$"}, "maxProperties": MAX_BIASES}

_BODIES: dict[str, Any] = {
    "chat": {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "sampling_params": {"max_new_tokens": 40, "temperature": 0},
    },
    "sglang": {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 40}, "stream": True},
    "sglang, several": {"text": ["Once upon a time", "The capital"], "sampling_params": {"max_new_tokens": 40}},
    "tgi": {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 40, "details": True}},
    "tgi, stream": {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 40}, "stream": True},
}
_SGLANG_ANSWER: dict[str, Any] = {
    "text": " there was a leaf",
    "output_ids": [412, 318, 64, 1907],
    "meta_info": {
        "id": "my-request-1",
        "finish_reason": {"type": "length", "length": 4},
        "prompt_tokens": 4,
        "completion_tokens": 4,
        "cached_tokens": 0,
    },
}
_TGI_ANSWER: dict[str, Any] = {
    "generated_text": " there",
    "details": {
        "finish_reason": "length",
        "generated_tokens": 1,
        "seed": None,
        "prefill": [],
        "tokens": [{"id": 412, "text": " there", "logprob": -0.25, "special": False}],
    },
}
_ANSWERS: dict[str, Any] = {
    "sglang": _SGLANG_ANSWER,
    "sglang, several": [_SGLANG_ANSWER, _SGLANG_ANSWER],
    "tgi": _TGI_ANSWER,
}
_STREAM_TEXT = (
    "With `stream`: events `id: N` and `data: JSON`, each ended by an empty line. The id is what `Last-Event-ID` "
    "takes. SGLang's events hold all text so far and end with `data: [DONE]`; TGI's hold one token each, the last also "
    "`generated_text` and `details`. An answer that cannot be finished ends with an event that holds an error"
)
_STREAMS = {
    "sglang": (
        'id: 1\ndata: {"text":" there","output_ids":[412],"meta_info":{"id":"my-request-1","finish_reason":'
        '{"type":"length","length":1},"prompt_tokens":4,"completion_tokens":1,"cached_tokens":0}}\n\n'
        "data: [DONE]\n\n"
    ),
    "tgi": (
        'id: 1\ndata: {"index":1,"token":{"id":412,"text":" there","logprob":-0.25,"special":false},'
        '"generated_text":" there","details":{"finish_reason":"length","generated_tokens":1,"seed":null,'
        '"input_length":4}}\n\n'
    ),
}

_COUNT: Schema = {"minimum": 1}
_NATURAL: Schema = {"minimum": 0}
_SEED: Schema = {"minimum": 0, "maximum": MAX_SEED}
_FRACTION: Schema = {"minimum": 0, "maximum": 1}
_PENALTY: Schema = {"minimum": -2, "maximum": 2}
_TOP_P: Schema = {"exclusiveMinimum": 0, "maximum": 1}


def _narrow_sglang() -> None:
    one_of_them(SglangFields, sorted(sglang.PROMPT_FIELDS))
    narrow_to_neutral(SglangFields, sglang.NEUTRAL)
    narrow_to_neutral(SglangSampling, sglang.NEUTRAL_SAMPLING)
    holds_tokens(SglangFields, "input_ids")
    holds_tokens(SglangSampling, "stop_token_ids")
    narrow(
        SglangFields,
        {
            "text": {"minLength": 1, "minItems": 1},
            "input_ids": {"minItems": 1},
            "messages": {"minItems": 1},
            "rid": {"minLength": 1, "minItems": 1},
            "top_logprobs_num": {"minimum": 0, "maximum": MAX_TOP_LOGPROBS},
        },
    )
    narrow(
        SglangSampling,
        {
            "max_new_tokens": _COUNT,
            "min_new_tokens": _NATURAL,
            "n": _COUNT,
            "temperature": {"minimum": 0, "maximum": MAX_TEMPERATURE},
            "top_p": _TOP_P,
            "top_k": {"minimum": -1},
            "min_p": _FRACTION,
            "stop": {"minLength": 1},
            "sampling_seed": _SEED,
            "frequency_penalty": _PENALTY,
            "presence_penalty": _PENALTY,
            "repetition_penalty": {"minimum": LEAST_REPETITION_PENALTY, "maximum": 2},
            "logit_bias": {**TOKEN_NAMES, "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
        },
    )


def _narrow_tgi() -> None:
    narrow_to_neutral(TgiParameters, tgi.NEUTRAL)
    narrow(TgiFields, {"inputs": {"minLength": 1}})
    narrow(
        TgiParameters,
        {
            "max_new_tokens": _COUNT,
            "temperature": {"exclusiveMinimum": 0, "maximum": MAX_TEMPERATURE},
            "top_k": _COUNT,
            "top_p": _TOP_P,
            "seed": _SEED,
            "stop": {"minLength": 1, "maxItems": tgi.MAX_STOPS},
            "truncate": _COUNT,
            "repetition_penalty": {"minimum": LEAST_REPETITION_PENALTY, "maximum": tgi.MAX_REPETITION_PENALTY},
            "frequency_penalty": _PENALTY,
            "top_n_tokens": {"minimum": 0, "maximum": tgi.MAX_TOP_TOKENS},
        },
    )


def _answer() -> Schema:
    one = schema_of(SglangAnswer)
    schema = {"anyOf": [one, {"type": "array", "items": one}, schema_of(TgiAnswer)]}
    answer = json_answer("The answer in the dialect of the question", schema, _ANSWERS, NAME_HEADER)
    told = (SglangAnswer, TgiEvent, FaultBody, TgiFaultBody)
    answer["content"] |= event_stream(_STREAM_TEXT, {"anyOf": schemas_of(told)}, _STREAMS)
    return answer


_narrow_sglang()
_narrow_tgi()
_DIALECTS = {"sglang": (sglang.fault, schema_of(FaultBody)), "tgi": (tgi.fault, schema_of(TgiFaultBody))}
GENERATE_OPENAPI: Schema = {
    "parameters": GENERATE_PARAMETERS,
    "requestBody": request_body({"anyOf": [schema_of(SglangFields), schema_of(TgiFields)]}, _BODIES),
    "responses": {"200": _answer(), **problems(_DIALECTS, GENERATE_ERRORS)},
}

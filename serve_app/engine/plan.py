"""What the engine and its executors say to each other. Data only; every message carries its epoch."""

import msgspec

from serve_app.engine.request import Emission, Grammar, Refusal, Request


class Shaping(msgspec.Struct, frozen=True, array_like=True):
    """What changes the logits as a function of the tokens so far."""

    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    grammar: Grammar | None
    end_ids: tuple[int, ...]  # what ends the answer: the only choice where a grammar is complete
    prompt: list[int]  # empty where nothing depends on it
    emitted: list[int]


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """How the last stage chooses the token that follows a slice. See `SamplingParams` for the fields' meaning."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    position: int  # absolute position of the token being chosen: the counter of the generator
    logprob: bool
    banned: tuple[int, ...] = ()  # token ids that may not be chosen (end tokens before min_new_tokens)
    top_logprobs: int = 0
    shaping: Shaping | None = None  # None for the most: nothing depends on earlier tokens


class Slice(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive tokens of one sequence computed in one step: a prefill chunk, or one decode token.

    The tokens sit at positions [start, start + len(tokens)). `pages` covers [0, start + len(tokens)).
    """

    start: int
    tokens: list[int]
    pages: list[int]
    sample: Sample | None  # None: a chunk that does not end the known tokens; nothing is sampled


class Plan(msgspec.Struct, frozen=True, array_like=True, tag="plan"):
    """One step: one microbatch of one replica through all stages. Running it again writes the same KV and tokens."""

    epoch: int
    replica: int
    step: int  # grows by one per (replica, step issued); never reused for other slices
    slices: list[Slice]
    after: int = -1  # the step of this epoch that comes before it; -1: it is the first. Workers run them in this order


class StepDone(msgspec.Struct, frozen=True, array_like=True, tag="step_done"):
    """The last stage's answer: one token for each slice that had `sample`, in plan order."""

    epoch: int
    replica: int
    step: int
    tokens: list[int]
    logprobs: list[float]  # one per token; 0.0 where the sample did not ask
    tops: list[list[tuple[int, float]]] = []  # one per token, where any sample asked; empty where that sample did not


# -- events: what goes into EngineCore.on -----------------------------------------------------------------------


class Begin(msgspec.Struct, frozen=True, array_like=True, tag="begin"):
    """A membership is in place: of the replicas [0, num_replicas) all but the `resting` are ready.

    Each has `num_pages` KV pages. Those in `kept` have still what was in them: their workers are those of the epoch
    before, and every step that was booked has been through all of them.
    """

    epoch: int
    num_replicas: int
    num_pages: int
    resting: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """A request. One whose rid is known is not run twice: its tokens behind `emitted` are emitted again, in one piece.

    So whoever lost a stream, or its engine, submits it again, with what it has.
    """

    request: Request


class Arrivals(msgspec.Struct, frozen=True, array_like=True, tag="arrivals"):
    """Requests that came while a step was being looked at: all are there when the next one is planned."""

    requests: list[Request]


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """End a request. Its pages are free within a step. Unknown or ended requests are ignored."""

    rid: str


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """End all requests that clients call so, or all there are (""); of one tenant, or of whomever (None)."""

    name: str
    tenant: str | None = None


Event = Begin | Submit | Arrivals | Cancel | Abort | StepDone

# -- commands: what comes out -----------------------------------------------------------------------------------


class Run(msgspec.Struct, frozen=True, array_like=True, tag="run"):
    plan: Plan


class Emit(msgspec.Struct, frozen=True, array_like=True, tag="emit"):
    emission: Emission


class Refuse(msgspec.Struct, frozen=True, array_like=True, tag="refuse"):
    """A Submit that is not let in."""

    refusal: Refusal


Command = Run | Emit | Refuse

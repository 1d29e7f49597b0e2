"""Why a request is not answered. Each dialect gives these its own status and shape."""

from serve_app.errors import OctavoError


class BadInputError(OctavoError):
    """The request cannot be served as it is: `field` names what to change, as a path like `sampling_params.top_p`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class BodyTooLargeError(BadInputError):
    """The body is over the limit; it was not read to its end."""

    def __init__(self, max_body_bytes: int) -> None:
        super().__init__("body", f"larger than the limit of {max_body_bytes} bytes")


class RefusedError(OctavoError):
    """The request is not let in now: it could not be answered in time. `retry_after_s` later it could."""

    def __init__(self, reason: str, text: str, retry_after_s: float) -> None:
        super().__init__(text)
        self.reason = reason  # for machines: "ttft", "queue-full", "fair-share", "draining", ...
        self.retry_after_s = retry_after_s  # 0: it never can be
        self.status = 503 if reason in {"no-capacity", "draining"} else 429  # of HTTP


class AbortedError(OctavoError):
    """Somebody ended the request by its name while it ran."""


class TimedOutError(OctavoError):
    """The client wanted the answer by then, or not at all."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the answer was not finished within the {timeout_s:g} s that x-request-timeout-ms allows")


class GenerationError(OctavoError):
    """An accepted request that the engine could not finish."""


class TakenOverError(GenerationError):
    """The client came back for its answer by another connection: this one gets no more of it."""

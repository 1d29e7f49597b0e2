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


class GenerationError(OctavoError):
    """An accepted request that the engine could not finish."""


class TakenOverError(GenerationError):
    """The client came back for its answer by another connection: this one gets no more of it."""

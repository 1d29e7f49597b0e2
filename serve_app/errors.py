"""The errors that users see. Each message is one sentence that says what to change."""


class OctavoError(Exception):
    """Base of every error that a user can cause and mend; the message is shown without a traceback."""

    status = 1  # with which the command ends


class ConfigError(OctavoError):
    """A config that cannot run: unknown key, layout that does not divide, missing path."""


class CheckpointError(OctavoError):
    """A checkpoint that cannot be served: unknown family, missing, truncated or misshapen tensors, pickles."""


class FetchError(OctavoError):
    """A model that could not be fetched or whose content is not what was expected."""


class PlanError(OctavoError):
    """Numbers that no plan can be made from: missing, contradicting, or such that no layout can hold or keep them."""

    status = 2

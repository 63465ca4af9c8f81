"""The exceptions users of the engine may catch.

Every error the engine raises on purpose derives from `EngineError`, says in one sentence what is wrong with the
numbers that show it, and what to do about it. Errors caused by a caller's argument are `ValueError`s as well.
An `AssertionError` or any other exception that escapes is a bug of ours, not of the caller's.
"""


class EngineError(Exception):
    """Base of every error the engine raises on purpose."""


class InvalidArgument(EngineError, ValueError):
    """A caller's argument is out of range or of the wrong kind."""


class RequestError(InvalidArgument):
    """A request can never be served: empty or too long a prompt, ids outside the vocabulary, bad sampling values."""


class ModelNotFound(EngineError):
    """No model under that name: not a directory, not cached, and not downloadable."""


class ConfigError(EngineError, ValueError):
    """A model's JSON files are missing, malformed, or ask for something the engine does not do."""


class WeightsError(EngineError):
    """A weight file is missing, truncated or inconsistent, or does not match the model's parameters."""


class TokenizerError(EngineError):
    """The tokenizer's files are missing or unusable."""


class ChatTemplateError(EngineError):
    """The chat template is missing, malformed, raised an error or exceeded its bounds."""


class DeviceError(EngineError):
    """The requested device or kernel family cannot be used here."""


class CapacityError(EngineError):
    """Memory does not suffice; the message says which length or batch fits."""


class NumericalError(EngineError):
    """NaN or infinity where finite numbers are required (weights, activations or logits)."""


class KernelFault(EngineError):
    """A CUDA kernel did wrong while it was emulated or checked: a data race, an access out of bounds, a deadlock."""


class EngineClosed(EngineError):
    """The engine was closed while or before the request ran."""

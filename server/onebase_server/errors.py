"""Every error of the server that a person may read, each with its HTTP status and the API's word for it.

    OnebaseError 500
    ├── BadRequest 400                 the request is wrong; `param` names the field
    │   └── ContextTooLong 400         prompt and answer do not fit the context or the KV cache
    ├── NotAuthenticated 401           no key, or a wrong one
    ├── NotAllowed 403                 the key is right, the deed is not allowed
    ├── ModelNotFound 404              `model` names neither the base nor an adapter
    ├── Overloaded 503                 the waiting queue is full; come back later
    ├── EngineUnavailable 503          the engine is starting, or died and is being restarted
    ├── AdapterDoesNotFit 507          an adapter is larger than the whole adapter memory
    └── ConfigurationError 500         the command line, the base model or a file is wrong; seen at start-up only

What can be wrong with an adapter is a tree of its own, `onebase_adapters.adapter.AdapterError`, with the same words.
"""

from typing import ClassVar


class OnebaseError(Exception):
    """Root of the server's own errors; its text is a sentence for the person who reads it."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadRequest(OnebaseError):
    """The request is wrong; `param` names the field."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class ContextTooLong(BadRequest):
    """Prompt and answer do not fit the context or the KV cache."""

    code = "context_length_exceeded"


class NotAuthenticated(OnebaseError):
    """No key was sent, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotAllowed(OnebaseError):
    """The deed is not allowed on this server or with this key."""

    status = 403
    type = "permission_error"
    code = "not_allowed"


class ModelNotFound(OnebaseError):
    """`model` names neither the base nor an adapter."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class Overloaded(OnebaseError):
    """The waiting queue is full."""

    status = 503
    code = "overloaded"


class EngineUnavailable(OnebaseError):
    """The engine is starting, or died and is being restarted."""

    status = 503
    code = "engine_unavailable"


class AdapterDoesNotFit(OnebaseError):
    """An adapter needs more than the whole adapter memory."""

    status = 507
    type = "invalid_request_error"
    code = "adapter_does_not_fit"


class ConfigurationError(OnebaseError):
    """The command line, the base model or a file of it is wrong; seen at start-up only."""

    code = "configuration_error"

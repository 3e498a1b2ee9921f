"""Errors that a caller over HTTP sees, each with its status and OpenAI's `type`, `param` and `code`.

HoneError
└── RequestError             400: something in the request
    ├── UnknownModelError    404: no such base, adapter, version or alias here
    ├── AdapterRefusedError  500: published, but its files are damaged or it does not reproduce its recorded outputs
    ├── EngineError          500: the model failed on a request that was fine
    └── DeadlineError        504: the time that the request gave passed
"""

from typing import ClassVar

from hone.errors import HoneError


class RequestError(HoneError):
    """A request that cannot be answered as it is."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    default_code: ClassVar[str | None] = None

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.param = param
        self.code = code or self.default_code

    def __str__(self) -> str:
        return self.message


class UnknownModelError(RequestError):
    """The model id names nothing that this server serves."""

    status = 404
    default_code = "model_not_found"


class AdapterRefusedError(RequestError):
    """The adapter exists, and serving it would give wrong answers."""

    status = 500
    type = "server_error"
    default_code = "adapter_refused"


class EngineError(RequestError):
    """The model could not finish a request."""

    status = 500
    type = "server_error"
    default_code = "engine_error"


class DeadlineError(RequestError):
    """The time that a request gave itself has passed."""

    status = 504
    type = "server_error"
    default_code = "deadline_exceeded"

"""Errors that a caller over HTTP sees, each with its status and OpenAI's `type`, `param` and `code`.

HoneError
└── RequestError             400: something in the request
    ├── InvalidKeyError      401: no API key, or one that opens nothing
    ├── ForbiddenError       403: a key that does not open this
    ├── UnknownModelError    404: no such base, adapter, version or alias here
    ├── BusyError            429: more requests wait than the server holds
    ├── RequestLimitError    429: the key's requests a minute
    ├── TokenLimitError      429: the key's tokens a minute
    ├── AdapterRefusedError  500: published, but its files are damaged or it does not reproduce its recorded outputs
    ├── EngineError          500: the model failed on a request that was fine
    │   ├── LostEngineError  500: the engine behind this replica has ended; the replica is being replaced
    │   └── StoppingError    503: this replica is going away; another answers
    ├── UnavailableError     503: nothing here can answer right now
    │   └── UnreachableError  503: the registry cannot be read, and what was asked for is not in memory
    └── DeadlineError        504: the time that the request gave passed
"""

import math
from typing import ClassVar

from hone.errors import HoneError

SOON_S = 1.0


class RequestError(HoneError):
    """A request that cannot be answered as it is."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    default_code: ClassVar[str | None] = None
    default_retry_after_s: ClassVar[float | None] = None

    def __init__(self, message: str, param: str | None = None, code: str | None = None, retry_after_s: float | None = None) -> None:
        """`retry_after_s` says that the same request can succeed after so many seconds."""
        super().__init__(message, param, code, retry_after_s)
        self.param = param
        self.code = code or self.default_code
        self.retry_after_s = self.default_retry_after_s if retry_after_s is None else retry_after_s

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's JSON."""
        return error_body(self.message, kind=self.type, param=self.param, code=self.code)

    @property
    def headers(self) -> dict[str, str]:
        """What tells OpenAI's client whether and when to try again; left to itself it repeats every 408, 409, 429 and 5xx twice."""
        if self.retry_after_s is not None:
            return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"x-should-retry": "false"} if self.status == 429 or self.status >= 500 else {}


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, dict[str, str | None]]:
    """OpenAI's JSON of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class InvalidKeyError(RequestError):
    """No API key came with the request, or one that opens nothing."""

    status = 401
    default_code = "invalid_api_key"


class ForbiddenError(RequestError):
    """The key is good, and not for this."""

    status = 403
    default_code = "insufficient_permissions"


class UnknownModelError(RequestError):
    """The model id names nothing that this server serves."""

    status = 404
    default_code = "model_not_found"


class BusyError(RequestError):
    """More requests wait than the server holds."""

    status = 429
    type = "rate_limit_error"
    default_code = "server_busy"
    default_retry_after_s = SOON_S


class RequestLimitError(RequestError):
    """The key has sent its requests of this minute."""

    status = 429
    type = "requests"
    default_code = "rate_limit_exceeded"


class TokenLimitError(RequestError):
    """The key has used its tokens of this minute."""

    status = 429
    type = "tokens"
    default_code = "rate_limit_exceeded"


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


class LostEngineError(EngineError):
    """What makes the answers has ended by itself and does not come back."""


class StoppingError(EngineError):
    """The replica is being stopped."""

    status = 503
    default_code = "draining"
    default_retry_after_s = SOON_S


class UnavailableError(RequestError):
    """Nothing here can answer right now: replicas are starting, have died, or are going away."""

    status = 503
    type = "server_error"
    default_code = "server_unavailable"
    default_retry_after_s = SOON_S


REPLICA_LOST = "replica_lost"
"""Code of an UnavailableError: the replica that had the request is gone."""


class UnreachableError(UnavailableError):
    """The registry cannot be read just now."""

    default_code = "registry_unreachable"


class DeadlineError(RequestError):
    """The time that a request gave itself has passed."""

    status = 504
    type = "server_error"
    default_code = "deadline_exceeded"

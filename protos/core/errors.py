"""What can go wrong, once for all processes.

    TidegateError
    ├── ConfigError         settings, a missing model, a port in use: the process ends with one line and exit 2
    ├── CaptureError        a capture that cannot be read
    ├── ProtocolMismatch    gateway and worker speak different versions of the Session protocol
    └── RequestError        what a client is told; carries an HTTP status and a gRPC status
        ├── InvalidRequest      400  the request is wrong; repeating it is useless
        ├── Unauthenticated     401  no API key, or one that nobody has
        ├── Forbidden           403  the tenant may not do this
        ├── UnknownModel        404  no worker serves the model
        ├── BodyTimeout         408  the body did not arrive in time
        ├── TooLarge            413  body over the limit
        ├── Overloaded          429  capacity is contended or a limit was hit; retry after a while
        ├── HeadersTooLarge     431  headers over the limit
        ├── Unavailable         503  nothing is ready, or draining, or the worker failed before the first token
        └── DeadlineExceeded    504  accepted, dispatched, and not answered in time

Inside the gateway an expected refusal is a *value*: the pipeline returns a RequestError, it does not raise one.
"""

from __future__ import annotations

import grpc


class TidegateError(Exception):
    """Base of everything Tidegate raises on purpose. `str(error)` is one line that says what to do next."""

    code = "error"


class ConfigError(TidegateError):
    code = "config"


class CaptureError(TidegateError):
    code = "capture"


class ProtocolMismatch(TidegateError):
    code = "protocol_mismatch"

    @classmethod
    def between(cls, *, worker: int, gateway: int) -> ProtocolMismatch:
        """Versions of the two ends; both ends say the same."""
        older = "worker" if worker < gateway else "gateway"
        return cls(f"the worker speaks Session protocol {worker}, the gateway {gateway}: upgrade the {older}")


class RequestError(TidegateError):
    """An answer other than 200.

    `type` is OpenAI's error type, `code` its machine-readable code, `param` the field at fault in the client's terms.
    `retry_after_s` is None where waiting does not help.
    """

    http_status = 500
    grpc_status = grpc.StatusCode.INTERNAL
    type = "server_error"
    retry_safe = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        reason: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.reason = reason
        """Value of `x-tidegate-reject-reason`."""
        self.retry_after_s = retry_after_s


class InvalidRequest(RequestError):
    code = "invalid_value"
    http_status = 400
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    type = "invalid_request_error"


class Unauthenticated(RequestError):
    code = "missing_api_key"
    http_status = 401
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    type = "invalid_request_error"


class Forbidden(RequestError):
    code = "forbidden"
    http_status = 403
    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    type = "invalid_request_error"


class UnknownModel(RequestError):
    code = "model_not_found"
    http_status = 404
    grpc_status = grpc.StatusCode.NOT_FOUND
    type = "invalid_request_error"


class BodyTimeout(RequestError):
    code = "request_timeout"
    http_status = 408
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    type = "invalid_request_error"
    retry_safe = True


class TooLarge(RequestError):
    code = "request_too_large"
    http_status = 413
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    type = "invalid_request_error"


class HeadersTooLarge(RequestError):
    code = "headers_too_large"
    http_status = 431
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    type = "invalid_request_error"


class Overloaded(RequestError):
    code = "rate_limit_exceeded"
    http_status = 429
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    type = "rate_limit_error"
    retry_safe = True


class Unavailable(RequestError):
    code = "service_unavailable"
    http_status = 503
    grpc_status = grpc.StatusCode.UNAVAILABLE
    retry_safe = True


class DeadlineExceeded(RequestError):
    code = "timeout"
    http_status = 504
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    retry_safe = True

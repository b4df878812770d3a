"""Refusals that a client is told about, by HTTP and by gRPC."""

from __future__ import annotations

import math

from grpc import StatusCode
from grpc_interceptor.exceptions import GrpcException

_GRPC = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    408: StatusCode.DEADLINE_EXCEEDED,
    413: StatusCode.RESOURCE_EXHAUSTED,
    415: StatusCode.INVALID_ARGUMENT,
    429: StatusCode.RESOURCE_EXHAUSTED,
    500: StatusCode.INTERNAL,
    501: StatusCode.UNIMPLEMENTED,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}


class Refusal(GrpcException):  # type: ignore[misc]
    """A request that is not answered, and why.

    Parameters
    ----------
    status : int
        HTTP status; the gRPC one follows from it.
    reason : str
        For the client. Never holds a prompt's text.
    retry_after : float, optional
        Seconds after which the same request may succeed.
    """

    def __init__(self, status: int, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason, _GRPC[status])
        self.http_status = status
        self.reason = reason
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that belong to the refusal."""
        found = {}
        if self.http_status == 401:
            found["www-authenticate"] = "Bearer"
        if self.retry_after is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        return found

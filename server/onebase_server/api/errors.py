"""Every failure as OpenAI's error envelope, `{"error": {"message", "type", "param", "code"}}`.

Whatever goes wrong (a wrong field, an unknown route, a bug) reaches the client in this one form. Nothing else in the
package builds an error response.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from onebase_adapters.errors import AdapterError
from onebase_server.errors import BadRequest, EngineUnavailable, NotAuthenticated, OnebaseError, Overloaded
from onebase_server.metrics import Outcome

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1
_SUBJECT = re.compile("Value error, |(Input|String|List|Value) (?=should )")
"""What pydantic's messages begin with; here the field's name stands before them."""
_CODES = {400: BadRequest.code, 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """What went wrong, for a person (`message`) and for a program (the rest)."""

    message: str
    type: str
    param: str | None
    code: str


@dataclass(frozen=True, slots=True)
class Envelope:
    """OpenAI's shape around every error."""

    error: ErrorBody


def envelope_of(exc: Exception) -> Envelope:
    """The envelope for any exception; one that nobody foresaw is told to the log, not to the client."""
    match exc:
        case OnebaseError():
            return Envelope(ErrorBody(exc.message, exc.type, exc.param, exc.code))
        case AdapterError():
            return Envelope(ErrorBody(_encodable(str(exc)), _type_of(exc.status), None, exc.code))
        case HTTPException():
            code = _CODES.get(exc.status_code, "http_error")
            return Envelope(ErrorBody(exc.detail, _type_of(exc.status_code), None, code))
        case _:
            message = "An internal error occurred; the server's log tells more."
            return Envelope(ErrorBody(message, OnebaseError.type, None, OnebaseError.code))


def status_of(exc: Exception) -> int:
    """The HTTP status for any exception."""
    match exc:
        case OnebaseError() | AdapterError():
            return exc.status
        case HTTPException():
            return exc.status_code
        case RequestValidationError():
            return BadRequest.status
        case _:
            return OnebaseError.status


def outcome_of(exc: Exception) -> Outcome:
    """How a generation request ended that an exception ended, for the metrics."""
    status = status_of(exc)
    if status < 500:
        return "refused"
    return "unavailable" if status == EngineUnavailable.status else "failed"


def error_response(exc: Exception) -> Response:
    """A whole response for any exception, with the headers that suit it."""
    headers: dict[str, str] = dict(getattr(exc, "headers", None) or {})
    if isinstance(exc, Overloaded | EngineUnavailable):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if isinstance(exc, NotAuthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    body = msgspec.json.encode(envelope_of(exc))
    return Response(body, status_of(exc), headers, media_type="application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Make every failure of `app` an envelope."""

    async def on_error(request: Request, exc: Exception) -> Response:
        if isinstance(exc, AdapterError) and exc.status >= 500:  # a bug is logged by the server, a damaged store here
            logger.error("%s %s failed", request.method, request.url.path, exc_info=exc)
        return error_response(exc)

    async def on_invalid(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        return error_response(_explain(exc.errors(), request.headers))

    async def on_http_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        if exc.status_code == 404:
            exc.detail = f"There is no {request.method} {request.url.path} here; see /docs."
        elif exc.status_code == 405:
            exc.detail = f"{request.url.path} does not take {request.method}; see /docs."
        return error_response(exc)

    app.add_exception_handler(OnebaseError, on_error)
    app.add_exception_handler(AdapterError, on_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_error)


def _encodable(text: str) -> str:
    """`text` as UTF-8 can carry it: what it quotes of an upload's JSON may hold half of a surrogate pair."""
    return text.encode(errors="replace").decode()


def _type_of(status: int) -> str:
    return BadRequest.type if status < 500 else OnebaseError.type


def _explain(problems: Sequence[Mapping[str, Any]], headers: Mapping[str, str]) -> BadRequest:
    """One sentence about the first thing that is wrong with a request; it names the field."""
    problem = problems[0]
    location = problem["loc"][1:]  # the first part says where the field was sought: body, path, query
    if problem["type"] == "json_invalid":
        return BadRequest(f"The body is not valid JSON: {problem['ctx']['error']} at character {location[0]}.")
    if not location:
        content_type = headers.get("content-type", "none")
        return BadRequest(
            f"The body must be a JSON object, sent as application/json (the content type is {content_type})."
        )
    field = ".".join(str(part) for part in location)
    match problem["type"]:
        case "missing":
            return BadRequest(f"The field {field} is missing.", param=field)
        case "extra_forbidden":
            return BadRequest(f"The field {field} is not supported by this server.", param=field)
        case _:
            reason = _SUBJECT.sub("", problem["msg"])
            return BadRequest(f"The field {field} is wrong: it {reason.rstrip('.')}.", param=field)

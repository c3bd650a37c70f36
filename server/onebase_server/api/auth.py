"""Who may do what: one key for generation, one for adapters, as `Authorization: Bearer KEY`.

A part whose key is not configured is open; `Settings` refuses to listen beyond this machine then. The admin key opens
generation too.
"""

import hmac
from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr
from starlette.requests import Request

from onebase_server.api.context import ContextDependency, context_of
from onebase_server.errors import NotAllowed, NotAuthenticated

_bearer = HTTPBearer(auto_error=False, description="ONEBASE_API_KEY for generation, ONEBASE_ADMIN_KEY for adapters.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


async def require_api_key(context: ContextDependency, credentials: Credentials) -> None:
    """Let a request generate; raises NotAuthenticated."""
    settings = context.settings
    if settings.api_key is None or _matches(credentials, settings.api_key, settings.admin_key):
        return
    raise _not_authenticated(credentials)


async def check_api_key(request: Request) -> None:
    """`require_api_key` for a request whose body has not been read; raises NotAuthenticated."""
    await require_api_key(context_of(request), await _bearer(request))


async def require_admin_key(context: ContextDependency, credentials: Credentials) -> None:
    """Let a request see and change adapters; raises NotAuthenticated, or NotAllowed for the generation key."""
    settings = context.settings
    if settings.admin_key is None or _matches(credentials, settings.admin_key):
        return
    if _matches(credentials, settings.api_key):
        raise NotAllowed("This key is for generation; adapters need the admin key.")
    raise _not_authenticated(credentials)


def _matches(credentials: HTTPAuthorizationCredentials | None, *keys: SecretStr | None) -> bool:
    """Whether the key sent is one of `keys`, in a time that tells nothing about them."""
    if credentials is None:
        return False
    sent = credentials.credentials.encode()
    return any(hmac.compare_digest(sent, key.get_secret_value().encode()) for key in keys if key is not None)


def _not_authenticated(credentials: HTTPAuthorizationCredentials | None) -> NotAuthenticated:
    if credentials is None:
        return NotAuthenticated("A key is needed: send it as `Authorization: Bearer KEY`.")
    return NotAuthenticated("The key that was sent is not one of this server's.")

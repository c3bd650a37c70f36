"""What every endpoint works with, handed to `create_app` once and to each endpoint by FastAPI."""

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends
from onebase_adapters.store import AdapterStore
from starlette.requests import HTTPConnection

from onebase_server.api.generation import Generator
from onebase_server.engine.client import EngineClient
from onebase_server.metrics import Metrics
from onebase_server.model.tokenizer import Tokenizer
from onebase_server.settings import Settings


@dataclass(frozen=True, slots=True)
class Context:
    """The server's collaborators; the tests make theirs, `onebase serve` its own."""

    settings: Settings
    engine: EngineClient
    store: AdapterStore
    tokenizer: Tokenizer
    metrics: Metrics
    generator: Generator


def get_context(connection: HTTPConnection) -> Context:
    """The context of the app that a request came to."""
    return cast(Context, connection.app.state.context)


ContextDependency = Annotated[Context, Depends(get_context)]

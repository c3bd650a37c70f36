"""What every endpoint works with, handed to `create_app` once and to each endpoint by FastAPI."""

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends
from starlette.requests import HTTPConnection

from onebase_adapters.store import AdapterStore
from onebase_server.api.admission import Admission
from onebase_server.api.publishing import Publisher
from onebase_server.api.template_processes import TemplateProcesses
from onebase_server.api.tokenizers import Tokenizers
from onebase_server.engine.client import EngineClient
from onebase_server.engine.request import Ready
from onebase_server.errors import EngineUnavailable
from onebase_server.metrics import Metrics
from onebase_server.settings import Settings


@dataclass(frozen=True, slots=True)
class Context:
    """The server's collaborators, alive for as long as the app is."""

    settings: Settings
    engine: EngineClient
    store: AdapterStore
    tokenizers: Tokenizers
    templates: TemplateProcesses
    metrics: Metrics
    admission: Admission
    publisher: Publisher

    @property
    def engine_info(self) -> Ready:
        """What the engine said of itself; raises EngineUnavailable while it is not ready."""
        info = self.engine.info
        if info is None:
            raise EngineUnavailable("The engine is starting; try again in a moment.")
        return info


def context_of(connection: HTTPConnection) -> Context:
    """The context of the app that a request came to."""
    return cast("Context", connection.app.state.context)


async def _provide_context(connection: HTTPConnection) -> Context:
    return context_of(connection)  # async, for FastAPI sends anything else to a thread


ContextDependency = Annotated[Context, Depends(_provide_context)]

"""The HTTP application, put together from collaborators that someone else made: `onebase serve`, or a test."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import onebase_server
from onebase_adapters.store import AdapterStore
from onebase_server.api import adapters, chat, completions, health, lora_compat, model_list
from onebase_server.api.admission import Admission
from onebase_server.api.body_limit import BodyLimit
from onebase_server.api.context import Context
from onebase_server.api.errors import Envelope, install_error_handlers
from onebase_server.api.publishing import Publisher
from onebase_server.api.template_processes import TemplateProcesses
from onebase_server.api.tokenizers import Tokenizers
from onebase_server.engine.client import EngineClient
from onebase_server.metrics import Metrics
from onebase_server.model.tokenizer import Tokenizer
from onebase_server.settings import Settings


def create_app(
    settings: Settings, *, engine: EngineClient, store: AdapterStore, tokenizer: Tokenizer, metrics: Metrics
) -> FastAPI:
    """The app; it starts the engine when it starts, and stops it when it stops."""
    templates = TemplateProcesses()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()
            await templates.stop()

    app = FastAPI(
        title="Onebase",
        summary="One NF4 base model, thousands of adapters.",
        version=onebase_server.__version__,
        lifespan=lifespan,
        strict_content_type=False,
        responses={"default": {"model": Envelope, "description": "What went wrong, in OpenAI's envelope."}},
    )
    app.state.context = Context(
        settings=settings,
        engine=engine,
        store=store,
        tokenizers=Tokenizers(tokenizer, store),
        templates=templates,
        metrics=metrics,
        admission=Admission(settings.max_num_seqs + settings.max_waiting),
        publisher=Publisher(store, engine, metrics, settings.served_name),
    )
    for module in (completions, chat, model_list, adapters, lora_compat, health):
        app.include_router(module.router)
    app.add_middleware(BodyLimit, streamed_paths=frozenset({adapters.router.prefix}))
    install_error_handlers(app)
    return app

"""`GET /v1/models`: the base first, then its adapters."""

import time

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends

from onebase_adapters.catalogue import AdapterVersion
from onebase_server.api.auth import require_api_key
from onebase_server.api.context import Context, ContextDependency
from onebase_server.api.models import resolve_model
from onebase_server.api.responses import ModelCard, ModelList

router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(require_api_key)])

STARTED = int(time.time())
"""When this server started, which is as old as its base gets."""


@router.get("")
async def list_models(context: ContextDependency) -> ModelList:
    """All that `model` may name; versions of adapters are at /v1/adapters."""
    versions = await run_sync(context.store.list_adapters)
    cards = [_adapter_card(context, version.name, version) for version in versions]
    return ModelList([_base_card(context), *cards])


@router.get("/{model:path}")
async def get_model(model: str, context: ContextDependency) -> ModelCard:
    """One model, by any name that a request could use."""
    version = await run_sync(resolve_model, model, context.settings.served_name, context.store)
    return _base_card(context) if version is None else _adapter_card(context, model, version)


def _base_card(context: Context) -> ModelCard:
    return ModelCard(context.settings.served_name, STARTED, _max_model_len(context), root=context.settings.served_name)


def _adapter_card(context: Context, model: str, version: AdapterVersion) -> ModelCard:
    return ModelCard(
        id=model,
        created=int(version.created_at.timestamp()),
        max_model_len=_max_model_len(context, version.num_virtual_tokens),
        root=version.label,
        parent=context.settings.served_name,
        own_tokenizer=list(version.tokenizer_parts),
    )


def _max_model_len(context: Context, num_virtual_tokens: int = 0) -> int | None:
    """Tokens of prompt and answer together, the adapter's own not counted; None while the engine is away."""
    return context.engine.info.max_model_len - num_virtual_tokens if context.engine.info else None

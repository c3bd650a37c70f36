"""What operators and load balancers ask: alive, ready, which version, how much of everything."""

from anyio.to_thread import run_sync
from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

import onebase_server
from onebase_server.api.context import ContextDependency

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health() -> dict[str, str]:
    """The API process is alive; says nothing about the engine."""
    return {"status": "alive"}


@router.get("/ready")
async def ready(context: ContextDependency) -> dict[str, str | int]:
    """Requests are taken; 503 while the engine loads or is restarted."""
    info = context.engine_info
    return {
        "status": "ready",
        "model": context.settings.served_name,
        "max_model_len": info.max_model_len,
        "quantization": info.quantization,
    }


@router.get("/version")
async def version() -> dict[str, str]:
    """This server's version."""
    return {"version": onebase_server.__version__}


@router.get("/metrics")
async def metrics(context: ContextDependency) -> Response:
    """Everything that is measured, for Prometheus."""
    context.metrics.engine_up.set(context.engine.is_ready)
    context.metrics.published_adapters.set(len(await run_sync(context.store.list_adapters)))
    return Response(context.metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

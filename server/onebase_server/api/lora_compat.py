"""vLLM's two routes for adapters, so that tools made for it can load and unload them here."""

from pathlib import Path

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends
from starlette.responses import PlainTextResponse

from onebase_adapters.errors import AdapterNotFound
from onebase_adapters.peft_format import ADAPTER_FILES
from onebase_server.api.auth import require_admin_key
from onebase_server.api.context import Context, ContextDependency
from onebase_server.api.schemas import LoadLoraAdapter, UnloadLoraAdapter
from onebase_server.errors import BadRequest, NotAllowed

router = APIRouter(prefix="/v1", tags=["vLLM"], dependencies=[Depends(require_admin_key)])


@router.post("/load_lora_adapter")
async def load_lora_adapter(body: LoadLoraAdapter, context: ContextDependency) -> PlainTextResponse:
    """Publish an adapter from a directory on the server, inside the folder given as --allow-local-paths."""
    directory = await run_sync(_resolve, body.lora_path, _allowed_folder(context))
    if not body.load_inplace and await _exists(context, body.lora_name):
        raise BadRequest(
            f"The adapter {body.lora_name} exists already; send load_inplace=true to replace it by a new version.",
            param="lora_name",
        )
    await context.publisher.publish(body.lora_name, directory)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadLoraAdapter, context: ContextDependency) -> PlainTextResponse:
    """Remove an adapter with all its versions."""
    _allowed_folder(context)
    await context.publisher.remove(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _allowed_folder(context: Context) -> Path:
    folder = context.settings.allow_local_paths
    if folder is None:
        raise NotAllowed("Loading adapters from the server's disk is off; --allow-local-paths DIR turns it on.")
    return folder.resolve()


def _resolve(lora_path: str, folder: Path) -> Path:
    """The directory meant, a relative one inside `folder`; raises NotAllowed if it, or a file of it, lies elsewhere."""
    try:
        directory = (folder / lora_path).resolve()
        files = [(directory / name).resolve() for name in ADAPTER_FILES]
        is_directory = directory.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a loop of links
        raise BadRequest("lora_path is not a path on this server.", param="lora_path") from error
    for path in (directory, *files):
        if not path.is_relative_to(folder):
            raise NotAllowed("lora_path is outside of the folder given as --allow-local-paths.", param="lora_path")
    if not is_directory:
        raise BadRequest("lora_path is not a directory.", param="lora_path")
    return directory


async def _exists(context: Context, name: str) -> bool:
    try:
        await run_sync(context.store.resolve, name)
    except AdapterNotFound:
        return False
    return True

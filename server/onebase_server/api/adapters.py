"""`/v1/adapters`: upload, list, roll back and delete adapters while the server runs."""

from functools import partial
from pathlib import Path

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends
from fastapi.concurrency import contextmanager_in_threadpool
from starlette.requests import Request

from onebase_adapters.archive import unpack
from onebase_adapters.catalogue import AdapterVersion
from onebase_adapters.peft_config import CONFIG_FILE
from onebase_adapters.peft_format import ADAPTER_FILES, WEIGHTS_FILE
from onebase_server.api.auth import require_admin_key
from onebase_server.api.context import ContextDependency
from onebase_server.api.responses import AdapterCard, AdapterList, AdapterRemoved
from onebase_server.api.schemas import RollbackRequest
from onebase_server.api.upload import Form, UploadedFile, receive_form
from onebase_server.errors import BadRequest

ARCHIVE = "archive"

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require_admin_key)])

_UPLOAD_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"},
                        "sha256": {"type": "string", "description": f"Expected sha256 of {ARCHIVE} or {WEIGHTS_FILE}."},
                        ARCHIVE: {"type": "string", "format": "binary", "description": "zip, tar or tar.gz."},
                        **{file: {"type": "string", "format": "binary"} for file in ADAPTER_FILES},
                    },
                }
            }
        },
    }
}


@router.post("", status_code=201, openapi_extra=_UPLOAD_FORM)
async def publish_adapter(request: Request, context: ContextDependency) -> AdapterCard:
    """Publish the next version of an adapter from a PEFT directory: an archive of it, or its files."""
    max_bytes = context.settings.max_upload_bytes
    async with contextmanager_in_threadpool(context.store.staging()) as staging:
        form = await receive_form(
            request,
            staging,
            max_bytes=max_bytes,
            fields={"name", "sha256"},
            files={ARCHIVE, *ADAPTER_FILES},
        )
        if not form.fields.get("name"):
            raise BadRequest("The form field name is missing.", param="name")
        source = _source(form)
        directory = await _unpacked(source, staging, max_bytes) if ARCHIVE in form.files else staging
        version = await context.publisher.publish(
            form.fields["name"],
            directory,
            expected_sha256=form.fields.get("sha256"),
            source_sha256=source.sha256,
        )
    return _card(version)


@router.get("")
async def list_adapters(context: ContextDependency) -> AdapterList:
    """The live version of every adapter."""
    return _cards(await run_sync(context.store.list_adapters))


@router.get("/{name}")
async def get_adapter(name: str, context: ContextDependency) -> AdapterCard:
    """The live version of an adapter."""
    return _card(await run_sync(context.store.resolve, name))


@router.get("/{name}/versions")
async def list_versions(name: str, context: ContextDependency) -> AdapterList:
    """All versions of an adapter, oldest first."""
    return _cards(await run_sync(context.store.versions, name))


@router.post("/{name}/rollback")
async def roll_back(name: str, context: ContextDependency, body: RollbackRequest | None = None) -> AdapterCard:
    """Make an older version live again, by default the one below the live one; running requests keep theirs."""
    return _card(await context.publisher.rollback(name, body.version if body else None))


@router.delete("/{name}")
async def remove_adapter(name: str, context: ContextDependency) -> AdapterRemoved:
    """Remove an adapter with all its versions; running requests finish on it."""
    await context.publisher.remove(name)
    return AdapterRemoved(name)


def _source(form: Form) -> UploadedFile:
    """The file that the announced digest is of; raises BadRequest if the form has not one adapter."""
    if (ARCHIVE in form.files) == any(file in form.files for file in ADAPTER_FILES):
        raise BadRequest(
            f"Send either {ARCHIVE}, or {CONFIG_FILE}, {WEIGHTS_FILE} and what there is of a tokenizer.", param=ARCHIVE
        )
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if ARCHIVE not in form.files and file not in form.files:
            raise BadRequest(f"The file {file} is missing.", param=file)
    return form.files.get(ARCHIVE) or form.files[WEIGHTS_FILE]


async def _unpacked(archive: UploadedFile, staging: Path, max_bytes: int) -> Path:
    directory = staging / "unpacked"
    directory.mkdir()
    await run_sync(partial(unpack, archive.path, directory, max_bytes=max_bytes))
    return directory


def _cards(versions: list[AdapterVersion]) -> AdapterList:
    return AdapterList([_card(version) for version in versions])


def _card(version: AdapterVersion) -> AdapterCard:
    return AdapterCard(
        name=version.name,
        version=version.version,
        digest=version.digest,
        source_sha256=version.source_sha256,
        rank=version.rank,
        targets=list(version.targets),
        bytes=version.nbytes,
        num_parameters=version.num_parameters,
        num_virtual_tokens=version.num_virtual_tokens,
        vocab_size=version.vocab_size,
        own_tokenizer=list(version.tokenizer_parts),
        created=int(version.created_at.timestamp()),
        is_live=version.is_live,
    )

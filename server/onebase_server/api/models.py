"""What a request's `model` names: the base, or one version of an adapter, held for as long as the request runs."""

from contextlib import ExitStack
from dataclasses import dataclass

from onebase_adapters.adapter import AdapterNotFound, VersionNotFound
from onebase_adapters.catalogue import AdapterVersion
from onebase_adapters.store import AdapterStore
from onebase_server.engine.request import AdapterRef
from onebase_server.errors import ModelNotFound


@dataclass(frozen=True, slots=True)
class Selection:
    """What a request runs on."""

    adapter: AdapterRef | None
    """The pinned version; None is the base alone."""
    name: str | None
    """The adapter's name, without a version."""


def select_model(model: str, base_name: str, store: AdapterStore, holds: ExitStack) -> Selection:
    """Resolve `base`, `adapter`, `base:adapter` or `adapter@version`, and lease the version until `holds` is closed.

    Raises:
        ModelNotFound: there is no such model.
    """
    if model == base_name:
        return Selection(None, None)
    name, _, wanted = model.removeprefix(f"{base_name}:").partition("@")
    if wanted and not wanted.isdecimal():
        raise ModelNotFound(f"The model {model} does not exist: a version is a number.", param="model")
    try:
        version = store.resolve(name, int(wanted) if wanted else None)
        holds.enter_context(store.lease(version.digest))
    except (AdapterNotFound, VersionNotFound) as error:
        raise ModelNotFound(f"The model {model} does not exist. {error}", param="model") from error
    return Selection(adapter_ref(store, version), name)


def adapter_ref(store: AdapterStore, version: AdapterVersion) -> AdapterRef:
    """A version as the engine knows it."""
    return AdapterRef(digest=version.digest, path=str(store.blob_path(version.digest)), label=version.label)

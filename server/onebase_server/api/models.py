"""What a request's `model` names: the base, or one version of an adapter, held for as long as the request runs."""

import re
from contextlib import ExitStack
from dataclasses import dataclass

from onebase_adapters.adapter import Adapter, AdapterNotFound, VersionNotFound
from onebase_adapters.catalogue import AdapterVersion
from onebase_adapters.store import AdapterStore
from onebase_server.engine.request import AdapterRef, Ready
from onebase_server.errors import AdapterDoesNotFit, ModelNotFound

VERSION = re.compile("[0-9]{1,18}")
"""What fits into 64 bits; more versions than that there will not be."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a request runs on."""

    adapter: AdapterRef | None
    """The pinned version; None is the base alone."""
    name: str | None
    """The adapter's name, without a version."""
    label: str
    """What a person calls it: the base's name, or `adapter@version`."""


def resolve_model(model: str, base_name: str, store: AdapterStore) -> AdapterVersion | None:
    """Which adapter version `adapter`, `base:adapter` or `adapter@version` is now; None for the base's own name.

    Raises:
        ModelNotFound: there is no such model.
    """
    if model == base_name:
        return None
    name, at, version = model.removeprefix(f"{base_name}:").partition("@")
    if at and not VERSION.fullmatch(version):
        raise ModelNotFound(f"The model {model} does not exist: a version is a number.", param="model")
    try:
        return store.resolve(name, int(version) if at else None)
    except (AdapterNotFound, VersionNotFound) as error:
        raise ModelNotFound(f"The model {model} does not exist. {error}", param="model") from error


def select_model(model: str, base_name: str, store: AdapterStore, engine: Ready, holds: ExitStack) -> Selection:
    """Resolve a model and keep its blob until `holds` is closed; raises ModelNotFound or AdapterDoesNotFit."""
    version = resolve_model(model, base_name, store)
    if version is None:
        return Selection(None, None, base_name)
    check_fit(version, engine)
    try:
        holds.enter_context(store.lease(version.digest))
    except AdapterNotFound as error:  # removed since it was resolved
        raise ModelNotFound(f"The model {model} does not exist. {error}", param="model") from error
    return Selection(adapter_ref(store, version), version.name, version.label)


def check_fit(adapter: Adapter | AdapterVersion, engine: Ready) -> None:
    """Raise AdapterDoesNotFit for an adapter that could never run in this engine's adapter memory or context."""
    if adapter.num_virtual_tokens:  # a prefix lives in the KV cache
        if adapter.num_virtual_tokens >= engine.max_model_len:
            raise AdapterDoesNotFit(
                f"The adapter has {adapter.num_virtual_tokens} virtual tokens, which leave no room for a prompt in "
                f"this model's context of {engine.max_model_len} tokens; train it with fewer, or start the server with "
                "a larger --max-model-len or --kv-cache-memory."
            )
        return
    needed = adapter.num_parameters * engine.adapter_element_bytes
    if needed > engine.adapter_bytes_total:
        raise AdapterDoesNotFit(
            f"The adapter needs {needed} bytes on the device, the whole adapter memory has "
            f"{engine.adapter_bytes_total}; lower its rank, or start the server with a larger --adapter-memory."
        )


def adapter_ref(store: AdapterStore, version: AdapterVersion) -> AdapterRef:
    """A version as the engine knows it."""
    return AdapterRef(
        digest=version.digest,
        path=str(store.blob_path(version.digest)),
        label=version.label,
        num_virtual_tokens=version.num_virtual_tokens,
    )

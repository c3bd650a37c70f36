"""What a request's `model` names: the base, or one version of an adapter, held for as long as the request runs."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from msgspec.structs import replace

from onebase_adapters.adapter import Adapter
from onebase_adapters.adapter_merging import require_lora
from onebase_adapters.blobs import read_blob
from onebase_adapters.catalogue import AdapterVersion
from onebase_adapters.errors import AdapterNotFound, InvalidMerge, VersionNotFound
from onebase_adapters.store import AdapterStore
from onebase_server.api.schemas import WeightedName
from onebase_server.engine.request import AdapterRef, Ready
from onebase_server.errors import AdapterDoesNotFit, BadRequest, ModelNotFound

VERSION = re.compile("[0-9]{1,18}")
"""What fits into 64 bits; more versions than that there will not be."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a request runs on."""

    adapter: AdapterRef | None
    """The pinned version; None is the base alone."""
    names: tuple[str, ...]
    """Of the adapters, without versions."""
    label: str
    """What a person calls it: the base's name, `adapter@version`, or `0.7*adapter@version+0.3*other@version`."""
    tokenizer_digest: str | None = None
    """Of what it brings of a tokenizer; None is the base's."""


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
        return Selection(None, (), base_name)
    return _select_version(version, store, engine, holds, param="model")


def select_combination(
    adapters: Sequence[WeightedName], base_name: str, store: AdapterStore, engine: Ready, holds: ExitStack
) -> Selection:
    """Resolve the adapters of a weighted combination and keep their blobs until `holds` is closed.

    Raises:
        ModelNotFound: one of them does not exist.
        BadRequest: one of them is the base, is no LoRA, or is there twice; or their tokenizers differ, or their ranks
            add up to too much.
        AdapterDoesNotFit: together they could never run.
    """
    versions = [_resolve_part(adapter.name, base_name, store) for adapter in adapters]
    if len(adapters) == 1 and adapters[0].weight == 1:
        return _select_version(versions[0], store, engine, holds, param="adapter")
    parts = []
    for adapter, version in zip(adapters, versions, strict=True):
        _hold(version, store, holds, param="adapter")
        _require_lora(version, store)
        (part,) = adapter_ref(store, version).parts
        parts.append(replace(part, weight=adapter.weight))
    if len({part.digest for part in parts}) < len(parts):
        raise BadRequest("adapter names the same adapter twice; add its weights up instead.", param="adapter")
    if (rank := sum(version.rank for version in versions)) > store.max_rank:
        raise BadRequest(f"The ranks add up to {rank}; this server allows at most {store.max_rank}.", param="adapter")
    _check_bytes(sum(version.num_parameters for version in versions), engine)
    ref = AdapterRef.combination(parts)
    return Selection(ref, tuple(version.name for version in versions), ref.label, _common_tokenizer(versions))


def _select_version(
    version: AdapterVersion, store: AdapterStore, engine: Ready, holds: ExitStack, *, param: str
) -> Selection:
    check_fit(version, engine)
    _hold(version, store, holds, param=param)
    return Selection(adapter_ref(store, version), (version.name,), version.label, version.tokenizer_digest)


def _resolve_part(name: str, base_name: str, store: AdapterStore) -> AdapterVersion:
    try:
        version = resolve_model(name, base_name, store)
    except ModelNotFound as error:
        raise ModelNotFound(error.message, param="adapter") from error
    if version is None:
        raise BadRequest(f"{name} is the base, which every combination contains already.", param="adapter")
    return version


def _common_tokenizer(versions: Sequence[AdapterVersion]) -> str | None:
    first = versions[0]
    for version in versions:
        if version.tokenizer_digest != first.tokenizer_digest:
            raise BadRequest(
                f"{first.label} and {version.label} cannot be combined: their tokenizers or chat templates differ, and "
                "a prompt can be written in one way only.",
                param="adapter",
            )
    return first.tokenizer_digest


def _require_lora(version: AdapterVersion, store: AdapterStore) -> None:
    if reason := _why_no_lora(store.blob_path(version.digest)):
        raise BadRequest(f"{version.label} cannot be part of a combination. {reason}", param="adapter")


@lru_cache(maxsize=10_000)
def _why_no_lora(blob: Path) -> str | None:
    """Why a blob's adapter is not the sum of low-rank updates alone; its name is its content's, so the answer stays."""
    try:
        require_lora(read_blob(blob))
    except InvalidMerge as error:
        return str(error)
    return None


def _hold(version: AdapterVersion, store: AdapterStore, holds: ExitStack, *, param: str) -> None:
    try:
        holds.enter_context(store.lease(version.digest))
    except AdapterNotFound as error:  # removed since it was resolved
        raise ModelNotFound(f"The model {version.label} does not exist. {error}", param=param) from error


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
    _check_bytes(adapter.num_parameters, engine)


def _check_bytes(num_parameters: int, engine: Ready) -> None:
    needed = num_parameters * engine.adapter_element_bytes
    if needed > engine.adapter_bytes_total:
        raise AdapterDoesNotFit(
            f"The adapter needs at least {needed} bytes on the device, the whole adapter memory has "
            f"{engine.adapter_bytes_total}; lower its rank, or start the server with a larger --adapter-memory."
        )


def adapter_ref(store: AdapterStore, version: AdapterVersion) -> AdapterRef:
    """A version as the engine knows it."""
    return AdapterRef.of_version(
        digest=version.digest,
        path=str(store.blob_path(version.digest)),
        label=version.label,
        num_virtual_tokens=version.num_virtual_tokens,
        invocation_tokens=version.invocation_tokens,
        vocab_size=version.vocab_size,
    )

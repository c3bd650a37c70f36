"""`onebase adapters`: look at and change an adapter store, also while a server has it open."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from onebase_adapters.adapter import AdapterError, BaseLayout
from onebase_adapters.archive import unpack
from onebase_adapters.catalogue import AdapterVersion
from onebase_adapters.store import AdapterStore, VerifyReport
from onebase_server.errors import ConfigurationError
from onebase_server.model.config import ModelConfig

app = typer.Typer(help="Publish, list, roll back and verify adapters.", no_args_is_help=True)

StoreOption = Annotated[
    Path, typer.Option("--store", envvar="ONEBASE_STORE", help="Directory of the adapter store.", show_default=True)
]
NameArgument = Annotated[str, typer.Argument(help="The adapter's name.")]

DEFAULT_STORE = Path("adapters")

console = Console()


@app.command("list")
def list_adapters(store: StoreOption = DEFAULT_STORE) -> None:
    """List the adapters with their live versions."""
    with _open(store) as opened:
        console.print(_table(opened.list_adapters(), title=f"Adapters of {opened.base_name}"))


@app.command()
def show(name: NameArgument, store: StoreOption = DEFAULT_STORE) -> None:
    """Show all versions of one adapter."""
    with _open(store) as opened:
        console.print(_table(opened.versions(name), title=f"Versions of {name}"))


@app.command()
def publish(
    name: NameArgument,
    source: Annotated[Path, typer.Argument(help="A PEFT directory, or a zip, tar or tar.gz of one.", exists=True)],
    store: StoreOption = DEFAULT_STORE,
    base: Annotated[
        Path | None,
        typer.Option(help="The base model's directory; needed to make a new store.", exists=True, file_okay=False),
    ] = None,
    base_name: Annotated[str | None, typer.Option(help="The base's name; by default its directory's.")] = None,
) -> None:
    """Publish the next version of an adapter; it is live at once for new requests."""
    with _open(store, base, base_name) as opened:
        if source.is_dir():
            published = opened.publish(name, source)
        else:
            with opened.staging() as directory:
                unpack(source, directory, max_bytes=opened.max_upload_bytes)
                published = opened.publish(name, directory)
        console.print(_table([published], title="Published"))


@app.command()
def rollback(
    name: NameArgument,
    version: Annotated[
        int | None, typer.Option(help="The version to make live; by default the highest below the live one.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Make an older version live again."""
    with _open(store) as opened:
        console.print(_table([opened.rollback(name, version)], title="Live now"))


@app.command()
def remove(name: NameArgument, store: StoreOption = DEFAULT_STORE) -> None:
    """Remove an adapter with all its versions."""
    with _open(store) as opened:
        console.print(_table(opened.remove(name), title="Removed"))


@app.command()
def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Delete orphans, drop versions without their blob.")] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Hold every blob against the catalogue; exits with 1 if something is wrong and was not repaired."""
    with _open(store) as opened:
        report = opened.verify(repair)
    for line in _describe(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not report.is_clean and not repair:
        raise typer.Exit(1)


@contextmanager
def _open(root: Path, base: Path | None = None, base_name: str | None = None) -> Iterator[AdapterStore]:
    """The store; what is wrong with it, with an adapter or with the base becomes one line and exit status 1."""
    try:
        layout: BaseLayout | None = None
        if base is not None:
            layout = ModelConfig.from_directory(base).adapter_layout()
            base_name = base_name or base.resolve().name
        store = AdapterStore.open(root, layout, base_name=base_name)
        try:
            yield store
        finally:
            store.close()
    except (AdapterError, ConfigurationError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _table(versions: Sequence[AdapterVersion], *, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("name", "version", "live", "rank", "targets", "size", "digest", "published"):
        table.add_column(heading, overflow="fold")
    for version in versions:
        table.add_row(
            version.name,
            str(version.version),
            "yes" if version.is_live else "",
            str(version.rank),
            " ".join(version.targets),
            decimal(version.nbytes),
            version.digest[:12],
            version.created_at.strftime("%Y-%m-%d %H:%M:%S UTC"),
        )
    return table


def _describe(report: VerifyReport) -> Iterator[str]:
    yield f"{report.versions_checked} versions checked."
    for damaged in report.damaged:
        yield f"{damaged.version.label}: its blob {damaged.version.digest} {_PROBLEMS[damaged.problem]}."
    for name in report.orphaned_blobs:
        yield f"Blob {name} belongs to no version."
    for name in report.left_overs:
        yield f"Staging directory {name} was left by a process that was killed."
    for name, version in report.now_live.items():
        yield f"{name}: version {version} is live now." if version else f"{name}: no whole version is left."
    if report.is_clean:
        yield "Everything is as it should be."
    else:
        yield "Repaired." if report.repaired else "Run it again with --repair to put this right."


_PROBLEMS = {"missing": "is missing", "changed": "does not have that sha256"}

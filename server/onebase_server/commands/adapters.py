"""`onebase adapters`: look at and change an adapter store, also while a server has it open."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from onebase_adapters.archive import unpack
from onebase_adapters.store import VerifyReport
from onebase_server.commands.adapters_export import export
from onebase_server.commands.adapters_merge import merge
from onebase_server.commands.store_access import (
    DEFAULT_STORE,
    NameArgument,
    StoreOption,
    console,
    open_store,
    version_table,
)

app = typer.Typer(help="Publish, merge, export, list, roll back and verify adapters.", no_args_is_help=True)
app.command()(merge)
app.command()(export)


@app.command("list")
def list_adapters(store: StoreOption = DEFAULT_STORE) -> None:
    """List the adapters with their live versions."""
    with open_store(store) as opened:
        console.print(version_table(opened.list_adapters(), title=f"Adapters of {opened.base_name}"))


@app.command()
def show(name: NameArgument, store: StoreOption = DEFAULT_STORE) -> None:
    """Show all versions of one adapter."""
    with open_store(store) as opened:
        console.print(version_table(opened.versions(name), title=f"Versions of {name}"))


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
    with open_store(store, base, base_name) as opened:
        if source.is_dir():
            published = opened.publish(name, source)
        else:
            with opened.staging() as directory:
                unpack(source, directory, max_bytes=opened.max_upload_bytes)
                published = opened.publish(name, directory)
        console.print(version_table([published], title="Published"))


@app.command()
def rollback(
    name: NameArgument,
    version: Annotated[
        int | None, typer.Option(help="The version to make live; by default the highest below the live one.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Make an older version live again."""
    with open_store(store) as opened:
        console.print(version_table([opened.rollback(name, version)], title="Live now"))


@app.command()
def remove(name: NameArgument, store: StoreOption = DEFAULT_STORE) -> None:
    """Remove an adapter with all its versions."""
    with open_store(store) as opened:
        console.print(version_table(opened.remove(name), title="Removed"))


@app.command()
def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Delete orphans, drop versions without their blob.")] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Hold every blob against the catalogue; exits with 1 if something is wrong and was not repaired."""
    with open_store(store) as opened:
        report = opened.verify(repair)
    for line in _describe(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not report.is_clean and not repair:
        raise typer.Exit(1)


def _describe(report: VerifyReport) -> Iterator[str]:
    yield f"{report.versions_checked} versions checked."
    for damaged in report.damaged:
        yield f"{damaged.version.label}: its blob {damaged.digest} {_PROBLEMS[damaged.problem]}."
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

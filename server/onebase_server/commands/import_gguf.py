"""`onebase import-gguf FILE DIR`."""

from pathlib import Path
from typing import Annotated

import typer

from onebase_server.progress import byte_progress


def import_gguf(
    file: Annotated[Path, typer.Argument(help="GGUF file of a Llama-architecture model.")],
    directory: Annotated[Path, typer.Argument(help="Hugging Face directory to make.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it exists.")] = False,
) -> None:
    """Convert a GGUF file to a Hugging Face directory that `onebase serve --base` takes."""
    from onebase_server.model import gguf_import  # here, so that the other commands start without gguf and numpy

    with byte_progress(f"Converting {file.name}") as on_progress:
        gguf_import.import_gguf(file, directory, force=force, on_progress=on_progress)
    typer.echo(f"{directory} is ready: onebase serve --base {directory}")

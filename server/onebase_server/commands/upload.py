"""An adapter from a command to a running server."""

import os
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from onebase_adapters.peft_format import ADAPTER_FILES
from onebase_server.errors import ConfigurationError

TIMEOUT_SECONDS = 300.0

ServerOption = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Publish to this running server instead of --store."),
]


def publish_to_server(name: str, directory: Path, url: str, console: Console) -> None:
    """Upload a PEFT directory to a running server; ONEBASE_ADMIN_KEY is its key, if it has one.

    Raises:
        ConfigurationError: The server cannot be reached, or refuses the adapter; the text says why.
    """
    files = [file for file in ADAPTER_FILES if (directory / file).is_file()]
    key = os.environ.get("ONEBASE_ADMIN_KEY")
    try:
        response = httpx.post(
            f"{url.rstrip('/')}/v1/adapters",
            data={"name": name},
            files={file: (file, (directory / file).read_bytes()) for file in files},
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=TIMEOUT_SECONDS,
        )
    except httpx.HTTPError as error:
        raise ConfigurationError(f"{name} is not published: {url} cannot be reached: {error}.") from error
    if response.is_error:
        raise ConfigurationError(f"{name} is not published: {url} refused it: {response.text}")
    console.print(f"Published {name} to {url}.", highlight=False)

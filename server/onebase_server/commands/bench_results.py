"""What the benchmark commands have in common: where results go, and the packages that they need."""

from collections.abc import Iterable
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from onebase_server.errors import ConfigurationError

EXTRA_PACKAGES = ("matplotlib", "psutil")
DEFAULT_OUTPUT = Path("bench-results")

OutputOption = Annotated[Path, typer.Option(help="Directory for the JSON and PNG files.", file_okay=False)]

console = Console(highlight=False)


def require_extra() -> None:
    """Raises ConfigurationError if the extra `bench` is not installed."""
    missing = [package for package in EXTRA_PACKAGES if find_spec(package) is None]
    if missing:
        raise ConfigurationError(
            f"Benchmarks need packages that are not installed ({', '.join(missing)}): pip install 'onebase[bench]'."
        )


def new_file(directory: Path, kind: str) -> Path:
    """The path of a JSON file named after the time and the kind of benchmark; the directory is made."""
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{datetime.now():%Y-%m-%d-%H%M%S}-{kind}.json"


def print_notes(notes: Iterable[str]) -> None:
    """A line each."""
    for note in notes:
        console.print(f"Note: {note}", markup=False, soft_wrap=True)

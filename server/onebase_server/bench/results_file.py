"""The JSON file of a benchmark's results, with the machine and the versions that they were measured on."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onebase_server.bench.machine import Machine, describe_versions

FORMAT = 1
"""Raise it when a field of the JSON changes its meaning."""
DOTS_PER_INCH = 120
"""Of the plots beside the file."""


def write_json(path: Path, machine: Machine, results: dict[str, Any]) -> None:
    """Write results with the machine they were measured on; a file of that name is replaced, and whole at any time."""
    document = {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "versions": describe_versions(),
        **results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_json(path, document)


def replace_json(path: Path, document: dict[str, Any]) -> None:
    """Write the file under another name first, so that under its own there is never half of it."""
    unfinished = path.with_suffix(".unfinished")
    try:
        unfinished.write_text(json.dumps(document, indent=2) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)

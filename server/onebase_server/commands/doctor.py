"""`onebase doctor`: what Onebase finds on this machine and would compute with, and what a base makes of a text."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from onebase_server.commands.settings_flags import read_settings, with_base_flags
from onebase_server.errors import ConfigurationError


@with_base_flags
def doctor(
    perplexity: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Compare the base's quantisations on this text.", exists=True, dir_okay=False
        ),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(metavar="LIST", help="Which to compare, such as `none,nf4`; by default all.")
    ] = None,
    **flags: Any,
) -> None:
    """Show the versions, devices and kernels that a server on this machine would use.

    With --perplexity, show what each quantisation of --base loses on a text of yours; its flags are those of serve.
    """
    if perplexity is not None:
        from onebase_server.commands.perplexity_table import show_perplexities  # torch takes seconds to import

        show_perplexities(perplexity, read_settings(flags), quantization)
    elif quantization or any(value is not None for value in flags.values()):
        raise ConfigurationError("Flags of a base need a text to compare its quantisations on: --perplexity FILE.")
    else:
        _show_machine()


def _show_machine() -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _findings():
        table.add_row(f"[bold]{name}[/bold]", value)
    Console().print(table)


def _findings() -> Iterator[tuple[str, str]]:
    import torch

    import onebase_server

    yield "onebase", onebase_server.__version__
    yield "python, torch", f"{platform.python_version()}, {torch.__version__}"
    yield "cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    has_cuda = torch.cuda.is_available()
    yield "CUDA", torch.cuda.get_device_name() if has_cuda else "no device that torch can use"
    yield from _kernels("cuda" if has_cuda else "cpu")


def _kernels(device_type: str) -> Iterator[tuple[str, str]]:
    """What `auto` chooses on that device, and of all others why not."""
    from onebase_kernels.backends import NAMES, PREFERENCE, best_backend, why_not
    from onebase_kernels.cpu.build import VARIANTS
    from onebase_kernels.cpu.library import why_not as why_not_variant

    order = ", ".join(PREFERENCE[device_type])
    yield "kernels (auto)", f"{best_backend(device_type)}, the first of {order} that can run on {device_type}"
    for name in NAMES:
        yield f"  {name}", why_not(name, device_type) or "can run"
        if name == "cpu":
            for variant in VARIANTS:
                yield f"    {variant}", why_not_variant(variant) or "can run"

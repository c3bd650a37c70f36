"""`onebase doctor`: what Onebase finds on this machine, and what it would compute with."""

import os
import platform
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table


def doctor() -> None:
    """Show the versions, devices and kernels that a server on this machine would use."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _findings():
        table.add_row(f"[bold]{name}[/bold]", value)
    Console().print(table)


def _findings() -> Iterator[tuple[str, str]]:
    import torch

    import onebase_server
    from onebase_kernels import best_backend
    from onebase_kernels.cpu.build import VARIANTS
    from onebase_kernels.cpu.library import why_not

    yield "onebase", onebase_server.__version__
    yield "python, torch", f"{platform.python_version()}, {torch.__version__}"
    yield "cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    has_cuda = torch.cuda.is_available()
    yield "CUDA", torch.cuda.get_device_name() if has_cuda else "no device that torch can use"
    yield "kernels (auto)", best_backend("cuda" if has_cuda else "cpu")
    for variant in VARIANTS:
        yield f"  cpu, {variant}", why_not(variant) or "can run"

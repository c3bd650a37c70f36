"""Who may import whom, as docs/architecture.md says; read from the code, nothing is imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels" / "onebase_kernels"
STORE = ROOT / "adapters_store" / "onebase_adapters"
SERVER = ROOT / "server" / "onebase_server"

FORBIDDEN: dict[Path, tuple[str, ...]] = {
    KERNELS: ("onebase_adapters", "onebase_server"),
    STORE: ("torch", "onebase_kernels", "onebase_server"),
    SERVER / "model": ("onebase_server.engine", "onebase_server.api", "onebase_server.commands"),
    SERVER / "engine": ("onebase_server.api", "onebase_server.commands", "onebase_adapters.store", "fastapi"),
    SERVER / "api": ("torch", "onebase_kernels", "onebase_server.commands", "onebase_server.engine.core"),
    SERVER / "bench": ("onebase_server.engine", "onebase_server.api", "onebase_server.commands"),
    SERVER / "settings.py": ("onebase_server", "onebase_adapters", "onebase_kernels", "torch"),
    SERVER / "errors.py": ("onebase_server", "onebase_adapters", "onebase_kernels", "torch"),
    SERVER / "metrics.py": ("onebase_server.api", "onebase_kernels", "onebase_adapters", "torch"),
}


def sources(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, function-level imports included; relative ones stay inside."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("place", FORBIDDEN, ids=lambda place: str(place.relative_to(ROOT)))
def test_nothing_reaches_across_the_packages(place: Path) -> None:
    files = sources(place)
    assert files
    trespasses = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imported_modules(path)
        if any(module == name or module.startswith(f"{name}.") for name in FORBIDDEN[place])
    ]
    assert trespasses == []


@pytest.mark.parametrize("module", ["onebase_server.cli", "onebase_server.api.app", "onebase_server.engine.client"])
def test_the_api_process_never_loads_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

"""Compiles the C++ ops, once for each instruction set; run by the package's build, or by hand after a change.

    python kernels/onebase_kernels/cpu/build.py

It needs nothing but a C++20 compiler (CXX, g++ or clang++). Where there is none it says so and builds nothing: the
torch back ends serve then, and `onebase doctor` tells. It knows which variants exist; `library.py` chooses among them.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
SOURCES = tuple(sorted(path.name for path in HERE.glob("*.cpp")))
OUTPUT = HERE / "lib"

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "amx": ("-march=sapphirerapids",),
    "avx512_bf16": ("-march=cooperlake",),
    "avx512": ("-march=skylake-avx512",),
    "avx2": ("-march=haswell",),
    "portable": (),
}
"""Compiler flags of each variant, the fastest first; machines that are not x86-64 get the last one only."""

FLAGS = (
    *("-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-pthread", "-fPIC", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # gcc 12's own intrinsics trip these
)


def find_compiler() -> str | None:
    """The C++ compiler to use: CXX if set, else g++ or clang++; None if there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next(filter(None, map(shutil.which, candidates)), None)


def library_path(variant: str) -> Path:
    """Where a variant's library lies."""
    return OUTPUT / f"onebase_cpu_{variant}.so"


def variants_for(compiler: str) -> list[str]:
    """The variants that this kind of machine could run and this compiler knows."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["portable"]
    return [variant for variant, flags in VARIANTS.items() if _knows(compiler, flags)]


def _knows(compiler: str, flags: Sequence[str]) -> bool:
    command = [compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def build(compiler: str) -> list[Path]:
    """Compile all variants, as many at a time as there are cores; raises CalledProcessError if one does not compile."""
    OUTPUT.mkdir(exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda variant: _build_variant(compiler, variant), variants_for(compiler)))


def _build_variant(compiler: str, variant: str) -> Path:
    path = library_path(variant)
    if _is_current(path):
        return path
    with TemporaryDirectory(dir=OUTPUT) as scratch:
        objects = []
        for source in SOURCES:
            target = Path(scratch) / f"{Path(source).stem}.o"
            command = [compiler, *FLAGS, *VARIANTS[variant], "-c", str(HERE / source), "-o", str(target)]
            subprocess.run(command, check=True)
            objects.append(target)
        finished = Path(scratch) / path.name
        subprocess.run([compiler, "-shared", "-pthread", *map(str, objects), "-o", str(finished)], check=True)
        finished.replace(path)  # renamed into place, for the one before may be in use
    return path


def _is_current(path: Path) -> bool:
    sources = [HERE / "build.py", *HERE.glob("*.cpp"), *HERE.glob("*.h")]
    return path.is_file() and path.stat().st_mtime >= max(source.stat().st_mtime for source in sources)


def main() -> None:
    """Build what a compiler can be found for."""
    compiler = find_compiler()
    if compiler is None:
        print("No C++ compiler: Onebase's CPU kernels are not built, its torch back ends will serve.", file=sys.stderr)
        return
    for path in build(compiler):
        print(path.relative_to(HERE))


if __name__ == "__main__":
    main()

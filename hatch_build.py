"""Part of the package's build: compiles the C++ ops into the wheel, or into the tree of an editable install."""

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CPU_KERNELS = Path("kernels/onebase_kernels/cpu")


class CpuKernelsHook(BuildHookInterface):  # type: ignore[type-arg]  # hatchling's own class leaves it open
    """Runs the kernels' own build script; where there is no compiler the wheel stays pure Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects files; `version` is `editable` for editable installs."""
        root = Path(self.root)
        subprocess.run([sys.executable, str(root / CPU_KERNELS / "build.py")], check=True)
        if version != "editable" and any((root / CPU_KERNELS / "lib").glob("*.so")):
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"  # plain C interfaces, whatever the Python

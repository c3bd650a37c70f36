"""What is Triton's alone: its kernels in the interpreter (on a GPU, if there is one), and their code for Hopper."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from os import environ
from pathlib import Path

import pytest
import torch

if not find_spec("triton"):
    collect_ignore_glob = ["test_*.py"]  # it has wheels for Linux on x86-64 alone

MachineCode = dict[str, dict[str, str]]


@pytest.fixture(autouse=True)
def _device(triton_device: None) -> None:
    """For all tests here."""


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What torch does not initialise is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def hopper_code() -> MachineCode:
    """The machine code of what the ops launch on a Hopper GPU, by case and kernel."""
    program = Path(__file__).with_name("compile_for_hopper.py")
    variables = {name: value for name, value in environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, program], env=variables, capture_output=True, text=True, check=True)
    code: MachineCode = json.loads(done.stdout)
    return code

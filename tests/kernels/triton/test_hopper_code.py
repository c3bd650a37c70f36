"""The kernels compiled for Hopper, without a GPU: what would be slow or wrong shows in the machine code."""

import re

import pytest

# predicate, operation, operands
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")


def instructions(sass: str) -> list[tuple[str, str]]:
    return INSTRUCTION.findall(sass)


def registers(first: str, count: int) -> set[str]:
    """The names of `count` registers from `first` on."""
    return {f"R{int(first) + i}" for i in range(count)}


@pytest.fixture(scope="module")
def kernels(hopper_code: dict[str, dict[str, str]]) -> dict[str, list[tuple[str, str]]]:
    return {
        f"{case}: {kernel}": instructions(sass) for case, code in hopper_code.items() for kernel, sass in code.items()
    }


def test_nothing_spills(kernels: dict[str, list[tuple[str, str]]]) -> None:
    for name, code in kernels.items():
        assert not [operation for operation, _ in code if operation.startswith(("LDL", "STL"))], name


def test_memory_is_read_in_whole_vectors(kernels: dict[str, list[tuple[str, str]]]) -> None:
    for name, code in kernels.items():
        assert any(re.match(r"LD(G|GSTS)\.E(\.BYPASS)?\.128", operation) for operation, _ in code), name


def test_products_run_on_tensor_cores(kernels: dict[str, list[tuple[str, str]]]) -> None:
    for name, code in kernels.items():
        if name.endswith(("shrink_kernel", "expand_kernel", "attend_kernel")):
            assert any(operation.startswith(("HMMA", "HGMMA")) for operation, _ in code), name


def test_no_register_is_written_while_an_asynchronous_product_still_reads_it(
    kernels: dict[str, list[tuple[str, str]]],
) -> None:
    """What ptxas before 13.3 may get wrong (triton issue 9433)."""
    num_checked = 0
    for name, code in kernels.items():
        in_use: set[str] = set()
        for operation, operands in code:
            if operation.startswith("WARPGROUP.DEPBAR"):
                in_use = set()
            elif left := operation.startswith("HGMMA") and re.match(r"R\d+, R(\d+), gdesc", operands):
                in_use |= registers(left[1], 4)
                num_checked += 1
            elif target := re.match(r"(R\d+)\b", operands):
                width = 4 if ".128" in operation else 2 if ".64" in operation else 1
                assert not registers(target[1][1:], width) & in_use, f"{name}: {operation} {operands}"
    assert num_checked > 10

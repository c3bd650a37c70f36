"""How many instructions the fused product takes for each code: what bounds it before memory does."""

import re
from collections import Counter

import pytest

from onebase_kernels.triton.plans import default_plan

MachineCode = dict[str, dict[str, str]]

LINE = re.compile(r"^\s*(?:(\.L_\w+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_]*)(.*))", re.MULTILINE)
LOGIC = {"PRMT", "LOP3", "SHF", "IADD3", "VIADD", "LEA", "ISETP", "SEL", "PLOP3"}
"""What runs on the integer pipe, which takes half as many instructions a clock as are issued."""


def hot_loop(sass: str) -> Counter[str]:
    """The instructions of the longest stretch from a label to a branch back to it."""
    labels: dict[str, int] = {}
    operations: list[str] = []
    loops = [0, 0]
    for label, operation, operands in LINE.findall(sass):
        if label:
            labels[label] = len(operations)
            continue
        operations.append(operation)
        target = re.search(r"\((\.L_\w+)\)", operands)
        if operation == "BRA" and target and target[1] in labels:
            loops = max(loops, [labels[target[1]], len(operations)], key=lambda loop: loop[1] - loop[0])
    return Counter(operations[slice(*loops)])


@pytest.mark.parametrize(
    ("case", "rows", "all_per_code", "logic_per_code"),
    [
        ("nf4, 1 row", 1, 3.5, 1.75),
        ("nf4, 32 rows", 32, 3.75, 1.8),
        ("nf4, 64 rows", 64, 5.2, 2.2),
        ("nf4, 256 rows", 256, 6.7, 2.2),
    ],
)
def test_few_instructions_are_spent_on_a_code(
    hopper_code: MachineCode, case: str, rows: int, all_per_code: float, logic_per_code: float
) -> None:
    plan = default_plan(rows, 4096, 4096, processors=132)
    codes = plan.unroll * plan.block_n * 64 / (32 * plan.num_warps)
    loop = hot_loop(hopper_code[case]["fused_kernel"])
    assert loop["HGMMA"]
    assert loop["PRMT"] == 1.25 * codes
    assert loop.total() / codes < all_per_code
    assert sum(loop[operation] for operation in LOGIC) / codes < logic_per_code

"""The fused product of whole numbers is exact, in every cut and at the shapes of an 8B model.

ptxas before 13.3 may miscompile asynchronous products whose left operand is in registers (triton issue 9433): a number
that is overwritten too early shows here. So would subnormal operands that a GPU does not take as they are.
"""

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor

from onebase_kernels.blockwise import BLOCK_SIZE, BlockwiseWeight
from onebase_kernels.triton.nf4_decode import CODEBOOKS, RECODED, operands
from onebase_kernels.triton.nf4_linear import fused_linear
from onebase_kernels.triton.nf4_packing import FragmentNf4, pack
from onebase_kernels.triton.plans import InvalidPlan, Plan, plan_for

pytestmark = pytest.mark.usefixtures("tensors_on_the_gpu")

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1024, 576)]
CUTS = [
    Plan(block_m, block_n, splits, unroll, num_warps)
    for block_m, (block_n, num_warps), splits, unroll in itertools.product(
        (16, 32, 64), ((64, 4), (128, 4), (128, 8)), (1, 3, 4), (1, 2, 4)
    )
]


@cache
def whole_weights(n: int, k: int) -> tuple[BlockwiseWeight, FragmentNf4]:
    """Random codes, with powers of two for scales."""
    generator = torch.Generator("cuda").manual_seed(n + k)
    codes = torch.randint(256, (n * k // 2,), dtype=torch.uint8, generator=generator)
    scales = 2.0 ** torch.randint(3, (n * k // BLOCK_SIZE,), generator=generator)
    weight = BlockwiseWeight(codes, scales.float(), (n, k))
    return weight, pack([weight])


def exact_product(x: Tensor, weight: BlockwiseWeight) -> Tensor:
    """What the kernel computes, in fp64: whole numbers, and two roundings, to fp32 and to x's type."""
    codebook = CODEBOOKS[x.dtype]
    multiples = (operands(x.dtype).double() / codebook.smallest)[list(RECODED)].to(x.device)
    codes = torch.stack((weight.codes >> 4, weight.codes & 15), dim=-1)
    weights = multiples[codes.int()].view(-1, BLOCK_SIZE) * weight.absmax.double()[:, None]
    sums = x.double() @ weights.view(weight.shape).T
    return (sums.float() * (1 / codebook.steps)).to(x.dtype)


def whole_inputs(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-2, 3, (rows, k), generator=torch.Generator("cuda").manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("dtype", CODEBOOKS, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 100, 256])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_plan_that_serves_is_exact(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    weight, packed = whole_weights(n, k)
    x = whole_inputs(rows, k, dtype)
    expected = exact_product(x, weight)
    for _ in range(3):
        assert torch.equal(fused_linear(x, packed, None, plan_for(rows, n, k, x.device)), expected)


@pytest.mark.parametrize("plan", CUTS, ids=str)
def test_every_cut_is_exact(plan: Plan) -> None:
    n, k = SHAPES[-1] if plan.splits == 3 else SHAPES[1]
    try:
        plan.check(n, k)
    except InvalidPlan as error:
        pytest.skip(str(error))
    weight, packed = whole_weights(n, k)
    x = whole_inputs(plan.block_m - 3, k, torch.bfloat16)
    assert torch.equal(fused_linear(x, packed, None, plan), exact_product(x, weight))

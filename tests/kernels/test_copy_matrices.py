"""An adapter's matrices are laid out in the target bit by bit as torch would, and nothing beside them is written."""

from collections.abc import Sequence
from importlib.util import find_spec

import pytest
import torch

import onebase_kernels as kernels
from onebase_kernels import FileMatrix, FilePlan, Matrix
from onebase_kernels.cpu.library import runnable_variants

GAP = 3


def in_file(matrices: Sequence[Matrix]) -> tuple[torch.Tensor, FilePlan]:
    """The matrices one after another in a file that begins with a header of 8 bytes."""
    parts, places = [torch.zeros(8, dtype=torch.uint8, device="cpu")], []
    for source, offset, scale, is_transposed, scales in matrices:
        rows, columns = source.shape
        start = sum(map(len, parts))
        places.append(FileMatrix(start, rows, columns, source.dtype, offset, scale, is_transposed, scales))
        parts.append(source.flatten().view(torch.uint8))
    return torch.cat(parts), FilePlan(tuple(places))


@pytest.mark.parametrize("are_in_file", [False, True], ids=["", "in a file"])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrices_lie_at_their_offsets_scaled_and_turned(
    backend: str, source_dtype: torch.dtype, target_dtype: torch.dtype, are_in_file: bool
) -> None:
    generator = torch.Generator("cpu").manual_seed(3)
    shapes = [(8, 64), (1, 5), (50, 3), (32, 16), (2, 17)]
    sources = [
        torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(source_dtype) for shape in shapes
    ]
    matrices, expected, end = [], [], GAP
    for index, source in enumerate(sources):
        scale, is_transposed = (1.0, 0.7, 2.0)[index % 3], index % 2 == 0
        matrices.append(Matrix(source, end, scale, is_transposed))
        turned = source.T if is_transposed else source
        expected.append((turned.float() * scale).to(target_dtype).flatten())
        end += source.numel() + GAP
    target = torch.full((end,), torch.nan, dtype=target_dtype, device="cpu")
    if are_in_file:
        file, plan = in_file(matrices)
        kernels.copy_file_matrices_(target, file, plan)
    else:
        kernels.copy_matrices_(target, matrices)
    for matrix, numbers in zip(matrices, expected, strict=True):
        assert torch.equal(target[matrix.offset : matrix.offset + numbers.numel()], numbers)
        assert target[matrix.offset - GAP : matrix.offset].isnan().all()
    assert target[end - GAP :].isnan().all()


@pytest.mark.parametrize("are_in_file", [False, True], ids=["", "in a file"])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "transposed"])
def test_matrices_in_8_bits_are_their_rows_rounded_to_127_steps_of_the_largest(
    backend: str, source_dtype: torch.dtype, target_dtype: torch.dtype, are_in_file: bool, is_transposed: bool
) -> None:
    generator = torch.Generator("cpu").manual_seed(3)
    source = torch.randn(36, 4, generator=generator, device="cpu").to(source_dtype)
    source[5] = 0
    source[:, 2] = 0
    matrix = (source.float() * 0.7).T if is_transposed else source.float() * 0.7
    rows, size = matrix.shape[0], matrix.numel() // target_dtype.itemsize
    scales, start = 8, 8 + rows * 4 // target_dtype.itemsize + 8
    target = torch.full((start + size + 8,), torch.nan, dtype=target_dtype, device="cpu")
    placed = Matrix(source, start, 0.7, is_transposed, scales)
    if are_in_file:
        file, plan = in_file([placed])
        kernels.copy_file_matrices_(target, file, plan)
    else:
        kernels.copy_matrices_(target, [placed])
    found_scales = target[scales : start - 8].view(torch.float32)
    found = target[start : start + size].view(torch.uint8).view(matrix.shape).float() - 128
    torch.testing.assert_close(found_scales, matrix.abs().amax(dim=1) / 127)
    assert found.abs().amax(dim=1).tolist() == [127 if scale else 0 for scale in found_scales.tolist()]
    assert ((matrix - found_scales.unsqueeze(1) * found).abs() <= 0.5001 * found_scales.unsqueeze(1)).all()
    for gap in (target[:scales], target[start - 8 : start], target[start + size :]):
        assert gap.isnan().all()


@pytest.mark.skipif(not runnable_variants() or not find_spec("triton"), reason="needs both the C++ ops and Triton")
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_beside_the_triton_kernels_the_cpu_ones_do_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[torch.Tensor] = []
    monkeypatch.setattr("onebase_kernels.cpu.backend.copy_matrices_", lambda target, matrices: targets.append(target))
    target = torch.zeros(1, device="cpu")
    kernels.copy_matrices_(target, [])
    assert targets == [target]

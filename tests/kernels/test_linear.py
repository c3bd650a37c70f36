"""Quantised linears and the adapters' side path, against plain matrix products."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import (
    LoraBatch,
    QuantizedWeight,
    Segment,
    dequantize,
    int8_matrices,
    quantize_fp4,
    quantize_int4,
    quantize_int8,
    quantize_nf4,
)

Pairs = list[tuple[Tensor, Tensor] | None]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


QUANTISE: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "nf4": lambda weight: quantize_nf4(weight, double_quant=False),
    "nf4, double": quantize_nf4,
    "fp4": lambda weight: quantize_fp4(weight, double_quant=False),
    "fp4, double": quantize_fp4,
    "int4 of 32": partial(quantize_int4, group_size=32),
    "int4 of 64": partial(quantize_int4, group_size=64),
    "int4 of 128": partial(quantize_int4, group_size=128),
    "int8": quantize_int8,
}


def quantise(kind: str, widths: Sequence[int], in_features: int) -> list[QuantizedWeight]:
    """Random weights that share their input, none centred on zero; skips where that makes no whole groups."""
    if kind.startswith("int4") and in_features % int(kind.split()[-1]):
        pytest.skip("no whole groups")
    return [QUANTISE[kind](random(n, in_features, seed=n) * 0.02 + 0.005) for n in widths]


@pytest.mark.parametrize("kind", QUANTISE)
@pytest.mark.parametrize(
    ("widths", "in_features"),
    [((64,), 64), ((96, 32, 32), 192), ((16, 48), 2112), ((40,), 128), ((33, 64), 160), ((48,), 384)],
    ids=["one tile row", "a group", "nested scales that change within rows", "odd width", "odd widths", "large groups"],
)
def test_quantized_linear_is_the_product_with_the_dequantised_weights(
    backend: str, widths: tuple[int, ...], in_features: int, kind: str
) -> None:
    weights = quantise(kind, widths, in_features)
    dense = torch.cat([dequantize(weight, torch.float32) for weight in weights])
    packed = kernels.pack_quantized(weights)
    for rows in (1, 2, 3, 8, 15, 16, 17, 33, 40, 64, 97, 112, 192, 200):
        x = torch.cat([random(rows, in_features, seed=2), torch.full((16, in_features), torch.nan)])[:rows]
        assert relative_error(kernels.quantized_linear(x, packed), x @ dense.T) < 1e-5, rows
        half = kernels.quantized_linear(x.bfloat16(), packed)
        assert half.dtype == torch.bfloat16
        assert relative_error(half, x @ dense.T) < 1e-2, rows


@pytest.mark.parametrize("kind", QUANTISE)
def test_packing_weights_changes_neither_their_number_nor_their_bytes(backend: str, kind: str) -> None:
    weight = QUANTISE[kind](random(2048, 2048) * 0.02)  # with 256 nested scales, as many as the map has values
    packed = kernels.pack_quantized([weight])
    assert packed.num_parameters == 2048 * 2048
    assert packed.nbytes == pytest.approx(weight.nbytes, rel=1e-4)  # some back ends pad


@pytest.mark.parametrize("kind", QUANTISE)
@pytest.mark.parametrize(
    ("widths", "in_features"),
    [((256, 64, 128), 256), ((96, 32, 32), 192), ((16, 48), 2112), ((33, 64), 160)],
    ids=["nested scales for whole tiles", "a group", "nested scales that change within rows", "odd shapes"],
)
def test_weights_come_out_of_a_packed_group_as_they_went_in(
    backend: str, widths: tuple[int, ...], in_features: int, kind: str
) -> None:
    weights = quantise(kind, widths, in_features)
    for weight, original in zip(kernels.unpack_quantized(kernels.pack_quantized(weights)), weights, strict=True):
        assert torch.equal(dequantize(weight, torch.float32), dequantize(original, torch.float32))


@pytest.mark.parametrize("kind", QUANTISE)
def test_quantized_linear_adds_the_bias_of_all_weights(backend: str, kind: str) -> None:
    packed = kernels.pack_quantized(quantise(kind, (32, 16), 128))
    x, bias = random(3, 128), random(48, seed=1)
    expected = kernels.quantized_linear(x, packed) + bias
    torch.testing.assert_close(kernels.quantized_linear(x, packed, bias), expected)
    half = kernels.quantized_linear(x.bfloat16(), packed, bias.bfloat16())
    assert relative_error(half, expected) < 1e-2


@pytest.mark.parametrize("rows", [1, 16, 17, 48, 112, 200])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 96), (16, 64), (240, 4096), (40, 50)])
def test_dense_linear_is_the_product_plus_the_bias(backend: str, outputs: int, inputs: int, rows: int) -> None:
    x, weight, bias = random(rows, inputs), random(outputs, inputs, seed=1) / inputs**0.5, random(outputs, seed=2)
    torch.testing.assert_close(kernels.dense_linear(x, weight, bias), x @ weight.T + bias)
    half = kernels.dense_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert half.dtype == torch.bfloat16
    assert relative_error(half, x @ weight.T + bias) < 1e-2
    assert relative_error(kernels.dense_linear(x.bfloat16(), weight.bfloat16()), x @ weight.T) < 1e-2


class Arena:
    """Adapters of one projection group packed as `add_lora_` wants them, amid NaN that must not be read."""

    def __init__(
        self,
        in_features: int,
        widths: Sequence[int],
        adapters: Sequence[Sequence[int]],
        epilogues: Sequence[int] = (0,) * 4,
        *,
        is_int8: bool = False,
    ) -> None:
        """The ranks of each adapter's slices, and which of them have an epilogue: a bit for each."""
        self.widths, self.adapters, self.bits, self.is_int8 = widths, adapters, epilogues, is_int8
        self.pairs: list[Pairs] = []
        self.epilogues: list[Pairs] = []
        for slot, ranks in enumerate(adapters):
            self.pairs.append(
                [
                    (
                        self._kept(random(rank, in_features, seed=slot)),
                        self._kept(random(rank, width, seed=slot + 100)).T,
                    )
                    if rank
                    else None
                    for rank, width in zip(ranks, widths, strict=True)
                ]
            )
            self.epilogues.append(
                [
                    (0.3 * random(width, seed=slot + 200), random(width, seed=slot + 300))
                    if epilogues[slot] >> i & 1
                    else None
                    for i, width in enumerate(widths)
                ]
            )

    def batch(self, dtype: torch.dtype, segments: Sequence[Segment]) -> LoraBatch:
        """A step's side path, with the group at the second of three places."""
        lead = int8_matrices.LINE_BYTES // dtype.itemsize if self.is_int8 else 5
        chunks, rows, offset = [torch.full((lead,), torch.nan, dtype=dtype)], [], lead
        for slot, ranks in enumerate(self.adapters):
            matrices = self._numbers(slot, dtype)
            vectors = [vector.to(dtype) for pair in filter(None, self.epilogues[slot]) for vector in pair]
            size = sum(map(len, (*matrices, *vectors)))
            gap = -size % lead if self.is_int8 else 3
            rows.append([offset, *ranks, *[0] * (3 - len(ranks)), self.bits[slot]])
            chunks += [*matrices, *vectors, torch.full((gap,), torch.nan, dtype=dtype)]
            offset += size + gap
        table = torch.tensor(rows, dtype=torch.int64)
        nowhere = torch.full_like(table, -1)
        tables = torch.stack([nowhere, table, nowhere])
        return LoraBatch(torch.cat(chunks), tables, tuple(segments), is_int8=self.is_int8)

    def _kept(self, matrix: Tensor) -> Tensor:
        """What is left of a matrix in 8 bits, if it is kept so: its numbers times its rows' largest, over 127."""
        if not self.is_int8:
            return matrix
        scales = matrix.abs().amax(dim=1, keepdim=True) / 127
        return scales * (matrix / scales).round()

    def _numbers(self, slot: int, dtype: torch.dtype) -> list[Tensor]:
        """All that lies before a slot's epilogues."""
        pairs = list(filter(None, self.pairs[slot]))
        matrices = [a for a, _ in pairs] + [b.T for _, b in pairs]
        if not self.is_int8 or not pairs:
            return [matrix.to(dtype).flatten() for matrix in matrices]
        scales = torch.cat([matrix.abs().amax(dim=1) / 127 for matrix in matrices])
        filling = torch.full((-len(scales) % 16,), torch.nan)
        codes = [(matrix * (127 / matrix.abs().amax(dim=1, keepdim=True))).round() + 128 for matrix in matrices]
        return [
            torch.cat([scales, filling]).view(dtype),
            *(matrix.to(torch.uint8).flatten().view(dtype) for matrix in codes),
        ]

    def add_to(self, y: Tensor, x: Tensor, segments: Sequence[Segment]) -> None:
        """The side path, after whatever made y."""
        kernels.add_lora_(y, x, self.batch(y.dtype, segments), 1, self.widths)

    def expected(self, y: Tensor, x: Tensor, segments: Sequence[Segment]) -> Tensor:
        """What the side path makes of y."""
        y = y.clone()
        for slot, start, stop in segments:
            slices = torch.split(y[start:stop], list(self.widths), dim=1)
            for part, pair, vectors in zip(slices, self.pairs[slot], self.epilogues[slot], strict=True):
                if pair is not None:
                    lora_a, lora_b = pair
                    part += x[start:stop] @ lora_a.T @ lora_b.T
                if vectors is not None:
                    gain, shift = vectors
                    part.copy_((1 + gain) * part + shift)
        return y


GROUPS = {"qkv": (24, 8, 8), "gate_up": (40, 40), "o": (32,), "wide": (1700, 200)}
RANKS = [4, 0, 16, 1]
SEGMENTS = {
    "none": [],
    "all the same": [Segment(2, 0, 11)],
    "all distinct": [Segment(slot % 4, slot, slot + 1) for slot in range(11)],
    "some rows have none": [Segment(3, 1, 4), Segment(0, 6, 7), Segment(2, 9, 11)],
}


IN_8_BITS = pytest.mark.parametrize("is_int8", [False, True], ids=["dense", "int8"])


@IN_8_BITS
@pytest.mark.parametrize("popularity", SEGMENTS)
@pytest.mark.parametrize("group", GROUPS)
def test_each_row_gets_its_own_adapter_and_others_are_untouched(
    backend: str, group: str, popularity: str, is_int8: bool
) -> None:
    widths, segments = GROUPS[group], SEGMENTS[popularity]
    # Ranks mix between adapters and between the slices of one adapter, empty slices and a wholly empty one included.
    adapters = [[RANKS[(slot + i) % 4] for i in range(len(widths))] for slot in range(4)]
    arena = Arena(48, widths, adapters, is_int8=is_int8)
    x, base = random(11, 48, seed=7), random(11, sum(widths), seed=8)
    y = base.clone()
    arena.add_to(y, x, segments)
    torch.testing.assert_close(y, arena.expected(base, x, segments), rtol=1e-4, atol=1e-4)
    idle = torch.ones(11, dtype=torch.bool)
    for _, start, stop in segments:
        idle[start:stop] = False
    assert torch.equal(y[idle], base[idle])


@IN_8_BITS
@pytest.mark.parametrize("popularity", SEGMENTS)
@pytest.mark.parametrize("group", GROUPS)
def test_slices_with_an_epilogue_get_it_after_the_update_and_others_do_not(
    backend: str, group: str, popularity: str, is_int8: bool
) -> None:
    widths, segments = GROUPS[group], SEGMENTS[popularity]
    # All slices, the last one, none, the first one; with and without ranks, and an adapter that is epilogues alone.
    adapters = [[RANKS[(slot + i) % 4] for i in range(len(widths))] for slot in range(3)] + [[0] * len(widths)]
    everywhere = (1 << len(widths)) - 1
    arena = Arena(48, widths, adapters, epilogues=(everywhere, 1 << len(widths) - 1, 0, 1), is_int8=is_int8)
    x, base = random(11, 48, seed=7), random(11, sum(widths), seed=8)
    y = base.clone()
    arena.add_to(y, x, segments)
    torch.testing.assert_close(y, arena.expected(base, x, segments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("in_features", "widths"),
    [(64, (64, 32, 32)), (96, (320,)), (48, (32,)), (192, (1600, 64))],
    ids=["qkv", "o", "odd inputs", "several pieces"],
)
@pytest.mark.parametrize("ranks", [(1, 8, 64), (16, 40, 33)])
@pytest.mark.parametrize("epilogues", [(0, 0, 0, 0), (1, 0, 1, 1)], ids=["no epilogues", "epilogues"])
@IN_8_BITS
def test_side_path_in_bfloat16_is_near_float32(
    backend: str,
    in_features: int,
    widths: tuple[int, ...],
    ranks: tuple[int, ...],
    epilogues: tuple[int, ...],
    is_int8: bool,
) -> None:
    adapters = [[rank] * len(widths) for rank in ranks] + [[0, *ranks[1:]][: len(widths)]]
    arena = Arena(in_features, widths, adapters, epilogues, is_int8=is_int8)
    x = random(62, in_features, seed=7)
    # One row, a few, whole tiles of rows and one more than these; between them rows without an adapter.
    segments = [Segment(0, 0, 1), Segment(1, 1, 4), Segment(2, 6, 22), Segment(0, 22, 55), Segment(3, 55, 60)]
    y = torch.zeros(62, sum(widths), dtype=torch.bfloat16)
    arena.add_to(y, x.bfloat16(), segments)
    assert relative_error(y, arena.expected(torch.zeros(62, sum(widths)), x, segments)) < 1e-2
    assert not y[[4, 5, 60, 61]].any()


@IN_8_BITS
def test_side_path_of_long_segments_in_bfloat16_is_near_float32(backend: str, is_int8: bool) -> None:
    """Several pieces of rows and, for the ranks of all slices, several tiles of them, the last of which is not full."""
    widths = (64, 32, 32)
    arena = Arena(64, widths, [[8, 8, 8], [40, 16, 33], [0, 0, 3]], is_int8=is_int8)
    x = random(345, 64, seed=7)
    segments = [Segment(1, 0, 200), Segment(0, 201, 270), Segment(2, 270, 343)]
    y = torch.zeros(345, sum(widths), dtype=torch.bfloat16)
    arena.add_to(y, x.bfloat16(), segments)
    assert relative_error(y, arena.expected(torch.zeros(345, sum(widths)), x, segments)) < 1e-2
    assert not y[[200, 343, 344]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("product", "is_int8"), [("nf4", False), ("int8", False), ("dense", False), ("nf4", True)])
def test_a_side_path_started_before_the_product_gives_what_it_gives_afterwards(
    backend: str, product: str, dtype: torch.dtype, is_int8: bool
) -> None:
    widths = (64, 32, 32)
    arena = Arena(64, widths, [[1, 8, 40], [16, 16, 16], [0, 300, 3]], (0, 5, 2), is_int8=is_int8)
    weight = random(sum(widths), 64) / 8
    packed = None if product == "dense" else kernels.pack_quantized([QUANTISE[product](weight)])

    def base(x: Tensor) -> Tensor:
        return kernels.quantized_linear(x, packed) if packed else kernels.dense_linear(x, weight.to(dtype))

    for rows in (1, 2, 16, 70):  # by a kernel of its own each
        x = random(rows, 64, seed=7).to(dtype)
        one, two, three = rows // 8, rows // 4, rows - rows // 8
        for segments in ([Segment(1, 0, rows)], [Segment(0, one, two), Segment(2, two, three)], []):
            lora = arena.batch(dtype, segments)
            expected = base(x)
            kernels.add_lora_(expected, x, lora, 1, widths)
            started = kernels.start_lora(x, lora, 1, widths)
            y = base(x)
            kernels.add_lora_(y, x, lora, 1, widths, started)
            assert torch.equal(y, expected), (rows, segments)


def test_a_side_path_does_without_the_product_it_was_started_for(backend: str) -> None:
    arena = Arena(64, (64,), [[8]])
    x, base, segments = random(4, 64, seed=7).bfloat16(), random(4, 64, seed=8).bfloat16(), [Segment(0, 1, 3)]
    lora = arena.batch(torch.bfloat16, segments)
    alone, after_another = base.clone(), base.clone()
    kernels.add_lora_(alone, x, lora, 1, (64,))
    started = kernels.start_lora(x, lora, 1, (64,))
    kernels.dense_linear(random(4, 64, seed=9).bfloat16(), random(32, 64).bfloat16())  # another x
    kernels.add_lora_(after_another, x, lora, 1, (64,), started)
    assert torch.equal(after_another, alone)


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
def test_what_is_no_number_spoils_its_own_row_alone(backend: str, spoiled: float) -> None:
    arena = Arena(64, (64,), [[8]], is_int8=True)
    x, y = random(3, 64, seed=7).bfloat16(), torch.zeros(3, 64, dtype=torch.bfloat16)
    x[1, 5] = spoiled
    arena.add_to(y, x, [Segment(0, row, row + 1) for row in range(3)])
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_sums_of_many_inputs_that_all_point_one_way_do_not_overflow_in_8_bits(backend: str) -> None:
    arena = Arena(16384, (64,), [[2]], is_int8=True)
    pair = arena.pairs[0][0]
    assert pair is not None
    x, segments = pair[0].sign(), [Segment(0, 0, 1), Segment(0, 1, 2)]
    y = torch.zeros(2, 64, dtype=torch.bfloat16)
    arena.add_to(y, x.bfloat16(), segments)
    assert relative_error(y, arena.expected(torch.zeros(2, 64), x, segments)) < 1e-2

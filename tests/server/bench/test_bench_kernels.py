"""`onebase bench kernels` on a tiny base: the same ops, contenders, formulas and files as on a large one."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import onebase_kernels as kernels
from onebase_server.bench.kernels import elementwise_cases, timing
from onebase_server.bench.kernels import rooflines as rooflines_module
from onebase_server.bench.kernels.cases import list_cases
from onebase_server.bench.kernels.linear_cases import DENSE, WITHOUT_ADAPTERS
from onebase_server.bench.kernels.options import KernelOptions, read_config
from onebase_server.bench.kernels.rooflines import Rooflines
from onebase_server.bench.kernels.timing import time_interleaved, wall_clock
from onebase_server.bench.kernels.trial import Contender, Trial, Work
from onebase_server.bench.kernels.workbench import Workbench
from onebase_server.cli import app

CPU = torch.device("cpu")
MEBIBYTE = 1 << 20
IN_PLACE = {"add_", "add_lora_", "write_kv_", "apply_rope_", "softcap_"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measurements as short as can be, on buffers that exceed only a small cache."""
    monkeypatch.setattr(timing, "MEASUREMENT_SECONDS", 1e-4)
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(rooflines_module, "MEMORY_BYTES", MEBIBYTE)
    monkeypatch.setattr(rooflines_module, "GEMM_SIZES", {"cpu": (64,), "cuda": (64,)})
    monkeypatch.setattr("onebase_server.bench.kernels.measure.last_level_cache_bytes", lambda _: MEBIBYTE)
    threads = torch.get_num_threads()
    yield
    kernels.use_backend(kernels.best_backend("cpu"))
    kernels.set_num_threads(threads)
    kernels.use_backend("reference")


@pytest.fixture
def make_bench(word_base: Path) -> Callable[..., Workbench]:
    def make(*, backend: str = "reference", cache: int = MEBIBYTE, free: int = 1 << 30, **options: object) -> Workbench:
        chosen = KernelOptions.model_validate({"base": word_base, "rows": (3,), "ranks": (2, 4), **options})
        return Workbench(read_config(chosen), chosen, CPU, backend, 1, cache, free)

    return make


@pytest.fixture
def bench_kernels(word_base: Path, tmp_path: Path) -> Callable[..., Result]:
    def run(*options: object) -> Result:
        arguments = ("bench", "kernels", "--repeats", 2, "--threads", 1, "--output", tmp_path / "results", *options)
        return CliRunner(env={"COLUMNS": "250"}).invoke(app, list(map(str, arguments)))

    return run


def trials_of(bench: Workbench, *ops: str) -> list[Trial]:
    return [trial for case in list_cases(bench.config, ops) for trial in case.trials(bench)]


def test_every_op_is_timed_and_written(bench_kernels: Callable[..., Result], word_base: Path, tmp_path: Path) -> None:
    result = bench_kernels("--base", word_base, "--rows", "1,3", "--ranks", "2,4", "--adapters", 3, "--context", 40)
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "results").glob("*-kernels.json")
    written = json.loads(file.read_text())
    loading = {"allocate", "allocate_kv", "copy_matrices_", "copy_file_matrices_"}
    loading |= {"pack_dense", "pack_quantized", "pack_screen", "unpack_quantized"}
    not_timed = loading | {"record", "replace_rows_", "set_num_threads", "start_lora"}
    assert {trial["op"] for trial in written["trials"]} == {op.__name__ for op in kernels.OPS} - not_timed | {
        "adapted_linear"  # with start_lora
    }
    assert {trial["rows"] for trial in written["trials"]} == {1, 3}
    for trial in written["trials"]:
        assert list(trial["timings"])[:2] == [written["backend"], "reference"]
        for measured in trial["timings"].values():
            assert 0 < measured["lowest"] <= measured["median"] <= measured["highest"]
        assert trial["cached_roofline_seconds"] > 0
    products = next(trial for trial in written["trials"] if trial["op"] == "quantized_linear")
    assert {"reference", "bitsandbytes", DENSE} <= set(products["timings"])
    assert written["rooflines"]["memory_bandwidth"] > 0
    assert set(written["rooflines"]["gemm"]) == {"bfloat16", "float32"}
    assert written["machine"]["cpu"]
    plots = {path.name.split("-kernels-")[1] for path in (tmp_path / "results").glob("*.png")}
    assert plots == {f"{trial['op'].strip('_')}.png" for trial in written["trials"]}
    for heading in ("quantized_linear gate_up", "of memory roofline", "bitsandbytes takes", "GFLOP/s"):
        assert heading in result.output


def test_a_case_that_fails_is_named_and_costs_no_other(
    bench_kernels: Callable[..., Result], word_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elementwise_cases, "silu_mul", failing_after_a_trial(torch.OutOfMemoryError("out of memory")))
    result = bench_kernels("--base", word_base, "--ops", "rms_norm,silu_mul,gelu_mul", "--rows", "1,3")
    assert result.exit_code == 1
    assert "silu_mul failed at 3 rows: OutOfMemoryError: out of memory" in result.output
    assert "Traceback" not in result.output
    (file,) = (tmp_path / "results").glob("*-kernels.json")
    written = json.loads(file.read_text())
    measured = [("rms_norm", 1), ("rms_norm", 3), ("silu_mul", 1), ("gelu_mul", 1), ("gelu_mul", 3)]
    assert [(trial["op"], trial["rows"]) for trial in written["trials"]] == measured
    (failure,) = written["failures"]
    assert (failure["op"], failure["rows"]) == ("silu_mul", 3)
    assert "raise error" in failure["traceback"]


def test_what_was_measured_before_it_was_stopped_is_written(
    bench_kernels: Callable[..., Result], word_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elementwise_cases, "gelu_mul", failing_after_a_trial(KeyboardInterrupt()))
    assert bench_kernels("--base", word_base, "--ops", "silu_mul,gelu_mul", "--rows", "1,3").exit_code != 0
    (file,) = (tmp_path / "results").iterdir()
    assert {trial["op"] for trial in json.loads(file.read_text())["trials"]} == {"silu_mul"}


def failing_after_a_trial(error: BaseException) -> Callable[[Workbench], Iterator[Trial]]:
    trials = elementwise_cases.silu_mul

    def failing(bench: Workbench) -> Iterator[Trial]:
        yield next(trials(bench))
        raise error

    return failing


def test_all_contenders_compute_the_same(make_bench: Callable[..., Workbench]) -> None:
    bench = make_bench(backend=kernels.best_backend("cpu"))
    compared = set()
    for trial in trials_of(bench):
        if trial.op in IN_PLACE | {"add_rms_norm_"}:  # one contender would find what another left
            continue
        results = []
        for contender in trial.contenders:
            if contender.name in (DENSE, WITHOUT_ADAPTERS):  # of weights that were never rounded; of less
                continue
            kernels.use_backend(contender.backend)
            results.append(contender.calls[-1](trial.steps[-1]))
        for result in results[1:]:
            # Random weights twice make large outputs.
            atol = 0.01 * float(results[0].float().norm()) if trial.op == "adapted_linear" else 0.05
            torch.testing.assert_close(result, results[0], rtol=0.05, atol=atol)
        compared.add(trial.op)
    assert {"quantized_linear", "adapted_linear", "paged_attention", "head_logits", "embed"} <= compared


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("silu_mul", Work(bytes=3 * 2 * (2 * 128 + 128), flops=5 * 3 * 128)),
        ("rms_norm", Work(bytes=2 * (3 * 64 * 2 + 64), flops=4 * 3 * 64)),
        ("write_kv_", Work(bytes=3 * 2 * 2 * 2 * 16 * 2, flops=0)),
        ("embed", Work(bytes=3 * 2 * 64 * 2, flops=0)),
        ("dense_linear", Work(bytes=2 * (64 * 128 + 3 * (64 + 128)), flops=2 * 3 * 64 * 128)),
    ],
)
def test_work_counts_every_operand_once(make_bench: Callable[..., Workbench], op: str, expected: Work) -> None:
    assert trials_of(make_bench(), op)[0].work == expected


def test_the_side_path_reads_the_adapters_that_the_rows_use(make_bench: Callable[..., Workbench]) -> None:
    numbers_per_rank = 3 * 64 + 128  # A of three slices, and each B's rows
    x_and_y = 2 * (64 + 2 * 128)
    for rows, ranks in ((1, [3]), (2, [2, 4]), (8, [2, 4, 2, 4])):
        trial = trials_of(make_bench(rows=(rows,), adapters=4), "add_lora_")[0]
        assert trial.work.bytes == 2 * sum(ranks) * numbers_per_rank + rows * x_and_y
        assert trial.work.flops == 2 * rows * 3 * numbers_per_rank
        for step in trial.steps:
            assert [row for segment in step.lora.segments for row in range(segment.start, segment.stop)] == [
                *range(rows)
            ]


def test_adapters_in_8_bits_read_half_and_their_scales(make_bench: Callable[..., Workbench]) -> None:
    numbers_per_rank, x_and_y = 3 * 64 + 128, 2 * (64 + 2 * 128)
    trial = trials_of(make_bench(rows=(2,), adapters=4, adapter_quantization="int8"), "add_lora_")[0]
    scales = 64 + 2 * 64  # of ranks 2 and 4, of A and B of three slices: 48 and 96 bytes, filled up
    assert trial.work.bytes == (2 + 4) * numbers_per_rank + scales + 2 * x_and_y
    assert all(step.lora.is_int8 and step.lora.alignment % 32 == 0 for step in trial.steps)


def test_attention_sees_the_context_that_was_asked_for(make_bench: Callable[..., Workbench]) -> None:
    decode, prefill = trials_of(make_bench(context=40), "paged_attention")
    assert decode.steps[0].attention.context_lens == (40, 40, 40)
    assert prefill.steps[0].attention.context_lens == (40,)
    assert decode.work.flops == 4 * 3 * 40 * 64
    assert prefill.work.flops == 4 * (38 + 39 + 40) * 64


def test_copies_exceed_the_cache_or_are_as_many_as_a_step_reads(make_bench: Callable[..., Workbench]) -> None:
    size = 1000
    assert make_bench(cache=10_000).num_copies(size, per_step=2) == 20
    weights = make_bench(cache=1 << 40).num_copies(size, per_step=2) * size
    head, linears = 401 * 64 * 2, 2 * (64 * 128 + 64 * 64 + 3 * 64 * 128) * 4.127 / 8
    assert head + linears <= weights <= head + linears + size
    assert make_bench(cache=1 << 40).num_copies(size, per_step=10_000) == 10_000
    assert make_bench(cache=1 << 40, free=8000).num_copies(size, per_step=2) == 4
    assert make_bench(cache=1 << 40, free=8000).num_copies(size, per_step=2, held=2 * size) == 2
    assert make_bench(free=10).num_copies(size, per_step=2) == 1


def test_contenders_take_turns() -> None:
    made: list[str] = []
    contenders = [Contender(name, [lambda _, name=name: made.append(name)]) for name in "AB"]
    timings = time_interleaved(contenders, [step_of(1)], 4, wall_clock, timing.make_burst)
    turns = [name for name, _ in groupby(made)]
    assert turns == ["A", "B"] * 5  # once to find out how long they take
    assert {timing.measurements for timing in timings.values()} == {4}


@pytest.mark.parametrize("backend", ["reference", kernels.best_backend("cpu")])
def test_no_copy_is_used_again_before_all_others(backend: str) -> None:
    caches = [torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16) for _ in range(150)]
    k = torch.ones(1, 1, 16, dtype=torch.bfloat16)

    def writer(cache):
        return lambda step: kernels.write_kv_(k, k, cache, cache, step.attention)

    kernels.use_backend(backend)
    burst = timing.make_burst(Contender("it", [writer(cache) for cache in caches], backend), [step_of(1)], wall_clock)
    for cache in caches:
        cache.zero_()
    used = 0
    while used < len(caches):
        assert sum(bool(cache.any()) for cache in caches) == used
        burst.run()
        used += burst.num_calls
    assert all(cache.any() for cache in caches)


@pytest.mark.skipif(kernels.best_backend("cpu") != "cpu", reason="the C++ ops are not built")
def test_what_is_said_to_be_recordable_is_in_the_program(
    make_bench: Callable[..., Workbench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else recording would compute it once, and each run of the program would time nothing."""
    passed_on: list[object] = []
    monkeypatch.setattr("onebase_kernels.cpu.backend.run", lambda call, _: passed_on.append(call))
    for trial in trials_of(make_bench(backend="cpu")):
        if trial.op == "head_logits" or not trial.contenders[0].is_recordable:  # a vocabulary of 401 is torch's
            continue
        kernels.use_backend("cpu")
        passed_on.clear()
        trial.contenders[0].calls[0](trial.steps[0])
        assert passed_on, trial.op


def test_a_roofline_is_the_slower_of_memory_and_products() -> None:
    rooflines = Rooflines(CPU, 0, 1 << 30, wall_clock)
    rooflines.bandwidths = {MEBIBYTE: 100.0, 2 * MEBIBYTE: 50.0}
    rooflines.gemm = {"bfloat16": 10.0, "float32": 2.0}
    assert rooflines.seconds(Work(bytes=1000, flops=10)) == 10
    assert rooflines.seconds(Work(bytes=1000, flops=200)) == 20
    assert rooflines.cached_seconds(Work(bytes=1000, flops=0), working_set=MEBIBYTE + 1) == 20


def test_a_smaller_working_set_is_no_slower_than_a_larger_one() -> None:
    rooflines = Rooflines(CPU, 0, 1 << 30, wall_clock)
    rooflines.bandwidths = {MEBIBYTE: 50.0, 2 * MEBIBYTE: 100.0}
    rooflines.gemm = {"bfloat16": 10.0}
    assert rooflines.cached_seconds(Work(bytes=1000, flops=0), working_set=1) == 10


def test_rates_only_get_better() -> None:
    rooflines = Rooflines(CPU, MEBIBYTE, 64 * MEBIBYTE, wall_clock)
    rooflines.meet(5 * MEBIBYTE)
    rooflines.measure()
    assert sorted(rooflines.bandwidths) == [4 * MEBIBYTE, 8 * MEBIBYTE]
    assert min(rooflines.bandwidths.values()) > 1e6
    rooflines.bandwidths[8 * MEBIBYTE] = 1e30
    rooflines.measure()
    assert rooflines.bandwidths[8 * MEBIBYTE] == 1e30


@pytest.mark.parametrize(("shape", "parameters"), [("8b", 6_979_321_856), ("70b", 68_451_041_280)])
def test_presets_have_the_size_of_their_name(shape: str, parameters: int) -> None:
    config = read_config(KernelOptions(shape=shape))
    of_layer = sum(group.in_features * sum(group.widths) for group in config.projection_groups)
    assert of_layer * config.num_layers == parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Say whose shapes: --demo, --base or --shape."),
        (["--demo", "--shape", "8b"], "Say whose shapes: --demo, --base or --shape."),
        (["--shape", "8b", "--ops", "silu_mul,softmax"], "there is no op softmax. There are quantized_linear,"),
        (["--shape", "8b", "--rows", "0"], "--rows is wrong"),
        (["--base", "/not/there"], "/not/there holds no config.json"),
    ],
)
def test_what_is_wrong_is_one_sentence(bench_kernels: Callable[..., Result], options: list[str], message: str) -> None:
    result = bench_kernels(*options)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_it_runs_without_the_packages_of_the_server(word_base: Path, tmp_path: Path) -> None:
    """As `make bench-gpu` does, on a machine that has little besides torch."""
    program = f"""
import runpy, sys
missing = ["bitsandbytes", "fastapi", "gguf", "httptools", "msgspec", "prometheus_client", "sqlalchemy", "uvicorn"]
sys.modules.update(dict.fromkeys(missing))
from onebase_server.bench.kernels import measure, rooflines, timing
rooflines.MEMORY_BYTES, rooflines.GEMM_SIZES = {MEBIBYTE}, {{"cpu": (64,)}}
measure.last_level_cache_bytes, timing.MEASUREMENT_SECONDS, timing.SETTLE_SECONDS = lambda _: {MEBIBYTE}, 1e-4, 0
options = ["--base", "{word_base}", "--device", "cpu", "--ops", "silu_mul,quantized_linear", "--rows", "1"]
sys.argv[1:] = [*options, "--repeats", "1", "--threads", "1", "--output", "{tmp_path}"]
runpy.run_module("onebase_server.commands.bench_kernels", run_name="__main__")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    (file,) = tmp_path.glob("*-kernels.json")
    timed = {contender for trial in json.loads(file.read_text())["trials"] for contender in trial["timings"]}
    assert "bitsandbytes" not in timed
    assert {"reference", DENSE} <= timed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_says_so(bench_kernels: Callable[..., Result]) -> None:
    result = bench_kernels("--shape", "8b", "--device", "cuda")
    assert result.exit_code == 1
    assert "this machine has no CUDA device" in result.output


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_graphs_are_replayed(bench_kernels: Callable[..., Result], word_base: Path, tmp_path: Path) -> None:
    result = bench_kernels("--base", word_base, "--rows", "1,3", "--ranks", "16", "--device", "cuda")
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "results").glob("*-kernels.json")
    assert {trial["rows"] for trial in json.loads(file.read_text())["trials"]} == {1, 3}


def step_of(rows: int) -> kernels.StepInputs:
    """One request of so many tokens, in the first block of its cache."""
    tokens = torch.arange(rows)
    attention = kernels.AttentionBatch((0, rows), (rows,), torch.zeros(1, 1, dtype=torch.int32), tokens)
    lora = kernels.LoraBatch(torch.zeros(1), torch.zeros(1, 1, kernels.TABLE_COLUMNS, dtype=torch.int64), ())
    return kernels.StepInputs(tokens, tokens, attention, lora)

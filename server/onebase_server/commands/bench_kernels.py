"""`onebase bench kernels`; as `python -m onebase_server.commands.bench_kernels` it needs no package of the server's."""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from onebase_server.bench.kernels.options import KernelOptions, read_config
from onebase_server.commands.bench_results import DEFAULT_OUTPUT, OutputOption, console, new_file, require_extra
from onebase_server.commands.model_flags import read_flags, with_flags
from onebase_server.errors import ConfigurationError
from onebase_server.progress import step_progress

if TYPE_CHECKING:
    from onebase_server.bench.kernels.workbench import Workbench


@with_flags(KernelOptions)
def kernels(output: OutputOption = DEFAULT_OUTPUT, **flags: Any) -> None:
    """Time each op of this machine's kernels against its peers and against what the machine can do.

    Nothing is served: the ops run in this process, with random operands in the shapes of a base. What fails is named at
    the end, and the exit status is then 1.
    """
    require_extra()
    options = read_flags(KernelOptions, flags)
    from onebase_server.bench.kernels import plots, report
    from onebase_server.bench.kernels.cases import list_cases
    from onebase_server.bench.kernels.measure import Measurements, measure_cases, rooflines_of, set_up
    from onebase_server.bench.machine import describe_machine
    from onebase_server.bench.results_file import write_json
    from onebase_server.model.weights import resolve_device

    config = read_config(options)
    cases = list_cases(config, options.ops)
    machine = describe_machine()
    bench = set_up(config, options, resolve_device(options.device))
    if options.tune:
        _tune(bench, output)
        return
    rooflines = rooflines_of(bench)
    path = new_file(output, "kernels")

    def write(found: Measurements) -> None:
        write_json(path, machine, report.describe(bench, found, rooflines))

    with step_progress("Trials") as on_progress:
        found = measure_cases(bench, cases, rooflines, on_progress, on_case=write)
    write(found)
    console.print(report.roofline_table(rooflines, bench), *report.case_tables(found.trials, rooflines))
    for op, of_op in groupby(found.trials, key=lambda trial: trial.op):
        plots.plot_op(path.with_name(f"{path.stem}-{op.strip('_')}.png"), list(of_op), rooflines)
    console.print(f"Written: {path} and a .png for each op")
    for failure in found.failures:
        console.print(str(failure), markup=False, soft_wrap=True)
    if found.failures:
        raise typer.Exit(1)


def _tune(bench: "Workbench", output: Path) -> None:
    if bench.backend != "triton":
        raise ConfigurationError(f"--tune is for the kernels `triton`, and `{bench.backend}` would compute.")
    from onebase_kernels.triton.plans import PLAN_FOLDER
    from onebase_server.bench.kernels import tuning
    from onebase_server.bench.results_file import replace_json

    path = new_file(output, "plans")
    tuned: list[tuning.TunedPlan] = []
    with step_progress("Shapes") as on_progress:
        for of_shape in tuning.tune(bench, on_progress):
            tuned.append(of_shape)
            replace_json(path, tuning.plan_file(bench, tuned))
    console.print(tuning.tuning_table(tuned))
    console.print(f"Written: {path}; in {PLAN_FOLDER} it is what serving goes by")


if __name__ == "__main__":
    typer.run(kernels)

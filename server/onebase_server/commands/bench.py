"""`onebase bench` and what stands below it; `onebase bench kernels` is in `bench_kernels.py`."""

from typing import Annotated, Any

import typer

from onebase_server.bench.load import ComparedLoads, Load, LoadTraits, Sweep
from onebase_server.bench.server_choice import ServerChoice, Vocabulary, read_compared_servers
from onebase_server.commands.bench_kernels import kernels
from onebase_server.commands.bench_results import (
    DEFAULT_OUTPUT,
    OutputOption,
    console,
    new_file,
    print_notes,
    require_extra,
)
from onebase_server.commands.model_flags import flag_of, read_flags, with_flags
from onebase_server.errors import ConfigurationError

app = typer.Typer()
app.command()(kernels)

ServerOption = Annotated[
    list[str],
    typer.Option(
        metavar="NAME=URL[,dialect=…][,model=…][,pid=…]",
        help="A running server, once for each; dialect is openai (also Onebase and vLLM) or llama.cpp.",
    ),
]

SCALE_REQUESTS = 64
"""Per run of `onebase bench scale`, unless told otherwise: enough for Zipf's law to reach beyond the first adapters."""


@app.callback(invoke_without_command=True)
@with_flags(ServerChoice, Load)
def bench(context: typer.Context, output: OutputOption = DEFAULT_OUTPUT, **flags: Any) -> None:
    """Put a server under load; print what it measured, and write it as JSON and as a plot.

    The server is a running one (--url), or one that is started for it (--demo, --base) and gets random adapters.
    A key is read from ONEBASE_API_KEY.
    """
    if context.invoked_subcommand is not None:
        _refuse_misplaced(flags, context.invoked_subcommand)
        return
    require_extra()
    from onebase_server.bench import plots, report
    from onebase_server.bench.machine import describe_machine
    from onebase_server.bench.measure import measure, request_progress
    from onebase_server.bench.results_file import write_json
    from onebase_server.bench.target import open_target

    choice, load = read_flags(ServerChoice, flags), read_flags(Load, flags)
    machine = describe_machine()
    with console.status("Preparing the server …") as status, open_target(choice, load) as target:
        adapters = target.adapters.names(load.num_adapters, choice.ranks)
        status.stop()
        with request_progress("Requests", load) as on_answer:
            measurement = measure(target, load, adapters, on_answer)
    console.print(report.throughput_table(measurement), report.latency_table(measurement.median))
    if measurement.memory is not None:
        console.print(report.memory_table(measurement.memory))
        if measurement.memory.parts:
            console.print(report.parts_table(measurement.memory.parts))
    print_notes(measurement.notes)
    path = new_file(output, "load")
    server = {"server": report.describe_target(target), "random_adapters": report.describe_adapters(choice)}
    write_json(path, machine, {**server, **report.describe_measurement(measurement)})
    plots.plot_latencies(path.with_suffix(".png"), measurement)
    console.print(f"Written: {path} and its .png")


@app.command()
@with_flags(Sweep, ServerChoice, Load)
def scale(output: OutputOption = DEFAULT_OUTPUT, **flags: Any) -> None:
    """Measure throughput and latency against the number of adapters, and against each of --ranks by itself.

    The number of adapters takes the place of --adapters, which holds for the ranks; by default --popularity is zipf
    and --requests 64. A running server's adapters have the ranks that they have, so there only their number is varied.
    """
    require_extra()
    from onebase_server.bench import plots, report
    from onebase_server.bench.machine import describe_machine
    from onebase_server.bench.results_file import write_json
    from onebase_server.bench.scale import Series, measure_by_count, measure_by_rank
    from onebase_server.bench.target import open_target

    flags["popularity"] = flags["popularity"] or "zipf"
    flags["requests"] = flags["requests"] or SCALE_REQUESTS
    sweep, choice, load = read_flags(Sweep, flags), read_flags(ServerChoice, flags), read_flags(Load, flags)
    if load.popularity == "none":
        raise ConfigurationError("bench scale varies the adapters, so --popularity none makes no sense there.")
    machine = describe_machine()
    largest = load.model_copy(update={"adapters": max(*sweep.counts, load.adapters)})
    path = new_file(output, "scale")
    finished: list[Series] = []
    with console.status("Preparing the server …") as status, open_target(choice, largest) as target:
        status.stop()
        sweeps = [measure_by_count(target, load, sweep, choice.ranks)]
        if choice.url is None:
            sweeps.append(measure_by_rank(target, load, choice.ranks))
        for growing in sweeps:
            for one in growing:
                described = [report.describe_series(series) for series in (*finished, one)]
                # after each round, for all may take hours, and the next one may be interrupted
                server = {"server": report.describe_target(target), "random_adapters": report.describe_adapters(choice)}
                write_json(path, machine, {**server, "series": described})
            finished.append(one)
    for one in finished:
        console.print(report.series_table(one))
        print_notes(dict.fromkeys(note for measurement in one.measurements for note in measurement.notes))
        plots.plot_series(path.with_name(f"{path.stem}-{one.varied}.png"), one)
    console.print(f"Written: {path} and a .png for each table")


@app.command()
@with_flags(ComparedLoads, LoadTraits, Vocabulary)
def compare(server: ServerOption, output: OutputOption = DEFAULT_OUTPUT, **flags: Any) -> None:
    """Measure running servers under the same loads, a run of each in turn, and the first one's ratio to the others.

    A server that lists fewer adapters than a load asks for is left out of that load. A key is read from ONEBASE_API_KEY
    and sent to all of them.
    """
    require_extra()
    from onebase_server.bench import plots, report
    from onebase_server.bench.comparison import LoadComparison
    from onebase_server.bench.comparison import compare as compare_servers
    from onebase_server.bench.machine import describe_machine
    from onebase_server.bench.results_file import write_json
    from onebase_server.bench.target import running_target

    choices = read_compared_servers(server, read_flags(Vocabulary, flags))
    traits = read_flags(LoadTraits, flags)
    compared = read_flags(ComparedLoads, flags)
    machine = describe_machine()
    targets = {name: running_target(choice, traits) for name, choice in choices.items()}
    servers = {name: report.describe_target(target) for name, target in targets.items()}
    path = new_file(output, "compare")
    comparisons: list[LoadComparison] = []
    for comparison in compare_servers(targets, compared.with_traits(traits), compared.settle):
        comparisons.append(comparison)
        described = [report.describe_comparison(one) for one in comparisons]
        # after each load, for it may take an hour, and the next one may be interrupted
        write_json(path, machine, {"servers": servers, "comparisons": described})
    console.print(report.comparison_table(comparisons))
    print_notes([note for one in comparisons for note in one.notes])
    plots.plot_comparison(path.with_suffix(".png"), comparisons)
    console.print(f"Written: {path} and its .png")


def _refuse_misplaced(flags: dict[str, Any], subcommand: str) -> None:
    """Flags between `bench` and its subcommand would be lost in silence."""
    given = [flag_of(name) for name, value in flags.items() if value is not None]
    if given:
        raise ConfigurationError(
            f"{', '.join(given)} must stand behind the subcommand: onebase bench {subcommand} {given[0]} …"
        )

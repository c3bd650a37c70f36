"""The `onebase` command: one line per subcommand, each in a module of its own under `commands/`."""

import typer

app = typer.Typer(
    help="Onebase: one NF4 base model, thousands of adapters.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)

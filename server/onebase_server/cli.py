"""The `onebase` command: one line per subcommand, each in a module of its own under `commands/`."""

from typing import Any

import typer
from typer.core import TyperGroup

from onebase_adapters.errors import AdapterError
from onebase_server.commands import adapters, bench
from onebase_server.commands.demo import demo
from onebase_server.commands.doctor import doctor
from onebase_server.commands.import_gguf import import_gguf
from onebase_server.commands.serve import serve
from onebase_server.commands.tune import tune
from onebase_server.errors import OnebaseError


class Commands(TyperGroup):
    """Shows an error of the project as the sentence that it is, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except (OnebaseError, AdapterError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Commands,
    help="Onebase: one NF4 base model, thousands of adapters.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.add_typer(adapters.app, name="adapters")
app.add_typer(bench.app, name="bench")
app.command()(demo)
app.command()(doctor)
app.command("import-gguf")(import_gguf)
app.command()(tune)
app.command()(serve)

"""`onebase adapters export`: an adapter out of the store, as PEFT's directory or merged into its base."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from onebase_adapters.adapter import Adapter
from onebase_adapters.base_layout import BaseLayout
from onebase_adapters.fused_projections import fuse_projections
from onebase_adapters.peft_stacks import stack_experts
from onebase_adapters.peft_writer import write_peft
from onebase_server.commands.store_access import (
    DEFAULT_STORE,
    StoreOption,
    console,
    open_store,
    read_adapter,
    require_base_of,
    resolve_reference,
    write_own_tokenizer,
)
from onebase_server.errors import ConfigurationError
from onebase_server.progress import step_progress

if TYPE_CHECKING:
    from onebase_server.model.merged_checkpoint import MergedError

WORST = 10
"""How many linears the table of errors shows."""


def export(
    name: Annotated[str, typer.Argument(help="The adapter, `name` or `name@version`.")],
    output: Annotated[Path, typer.Argument(help="The directory to write; it must not exist yet.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Write the base with the adapter merged in, as a Hugging Face model.")
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(help="The base model's directory; needed with --merged.", exists=True, file_okay=False),
    ] = None,
    quantization: Annotated[
        Literal["none", "nf4"], typer.Option(help="How the merged linears are written; nf4 is bitsandbytes' format.")
    ] = "none",
    dtype: Annotated[
        Literal["bfloat16", "float32", "float16"], typer.Option(help="Of what is written unquantised.")
    ] = "bfloat16",
    base_quantization: Annotated[
        Literal["nf4", "fp4", "int4", "int8", "none"],
        typer.Option(help="What the adapter is added to: the base as `onebase serve` keeps it, or unquantised."),
    ] = "nf4",
    double_quant: Annotated[bool, typer.Option(help="Quantise the block scales of nf4 and fp4 too.")] = True,
    group_size: Annotated[int, typer.Option(help="Of a base in int4.")] = 64,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write an adapter as a PEFT directory, or with --merged the base with it as an ordinary checkpoint."""
    with open_store(store) as opened:
        version = resolve_reference(opened, name)
        adapter = read_adapter(opened, version)
        base_name, layout = opened.base_name, opened.layout
        if not merged:
            _export_peft(adapter, output, base_name, layout)
        elif base is None:
            raise ConfigurationError(f"--merged needs the base to merge into: --base DIRECTORY of {base_name}.")
        else:
            require_base_of(opened, base)
            from onebase_server.model import merged_checkpoint  # torch takes seconds to import

            form = merged_checkpoint.ExportForm(quantization, dtype, base_quantization, double_quant, group_size)
            with step_progress(f"Merging {name} into {base_name}") as on_progress:
                errors = merged_checkpoint.export_merged(base, adapter, output, form, on_progress)
            together = merged_checkpoint.all_together(errors)
            console.print(error_table(together, errors, quantization if quantization == "nf4" else dtype))
        write_own_tokenizer(opened, version, output)
    console.print(f"Wrote {output}.", highlight=False)


def _export_peft(adapter: Adapter, output: Path, base_name: str, layout: BaseLayout) -> None:
    if output.exists():
        raise ConfigurationError(f"{output} already exists; choose another directory or remove it first.")
    whole = fuse_projections(adapter, layout) if layout.is_fused else adapter
    write_peft(stack_experts(whole, layout), output, base_name=base_name)


def error_table(together: "MergedError", errors: "Sequence[MergedError]", form: str) -> Table:
    """All linears together, then the worst by relative error."""
    table = Table(title=f"Error of rounding base + adapter to {form}", title_justify="left")
    table.add_column("linear", overflow="fold")
    table.add_column("relative to the weight", justify="right")
    table.add_column("relative to the update", justify="right")
    for error in (together, *sorted(errors, key=lambda error: -error.relative)[:WORST]):
        table.add_row(error.name, f"{error.relative:.2e}", f"{error.of_update:.2e}")
    return table

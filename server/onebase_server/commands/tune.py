"""`onebase tune`: train an adapter on a file of examples, and publish it if asked to."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from onebase_server.commands import adapters
from onebase_server.commands.store_access import DEFAULT_STORE, StoreOption
from onebase_server.commands.upload import ServerOption, publish_to_server
from onebase_server.errors import ConfigurationError
from onebase_server.tuning.recipe import Recipe

DEFAULTS = Recipe()
ALL_LINEAR = "all-linear"

console = Console()


def tune(
    base: Annotated[Path, typer.Option(help="The base model's directory.", exists=True, file_okay=False)],
    data: Annotated[Path, typer.Option(help="JSONL of `messages`, or of `prompt` and `completion`.", exists=True)],
    output: Annotated[Path, typer.Option(help="The PEFT directory to write; it must not exist yet.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank of the update of each linear.")] = DEFAULTS.rank,
    alpha: Annotated[int, typer.Option(min=1, help="The update is scaled by alpha / rank.")] = DEFAULTS.alpha,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / √rank instead.")] = False,
    targets: Annotated[
        str, typer.Option(help="Linears to adapt: `all-linear`, or names such as `q_proj,v_proj`.")
    ] = ALL_LINEAR,
    dropout: Annotated[float, typer.Option(min=0, max=0.9, help="Dropout before each A.")] = DEFAULTS.dropout,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = DEFAULTS.epochs,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a step.")] = DEFAULTS.batch_size,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = DEFAULTS.learning_rate,
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Share of steps that warm up.")] = DEFAULTS.warmup,
    weight_decay: Annotated[float, typer.Option(min=0, help="AdamW's weight decay.")] = DEFAULTS.weight_decay,
    max_length: Annotated[int, typer.Option(min=2, help="Most tokens of an example.")] = DEFAULTS.max_length,
    eval_share: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the examples to hold out and measure after each epoch.")
    ] = DEFAULTS.eval_share,
    seed: Annotated[int, typer.Option(help="Same seed, same adapter on the same machine.")] = DEFAULTS.seed,
    quantization: Annotated[
        Literal["nf4", "none"], typer.Option(help="How the base's linears are kept.")
    ] = DEFAULTS.quantization,
    dtype: Annotated[
        Literal["bfloat16", "float32", "float16"], typer.Option(help="What the base computes in.")
    ] = DEFAULTS.dtype,
    publish: Annotated[str | None, typer.Option(metavar="NAME", help="Publish the adapter under this name.")] = None,
    store: StoreOption = DEFAULT_STORE,
    server: ServerOption = None,
) -> None:
    """Train a LoRA adapter on the NF4 base and write it as a PEFT directory."""
    recipe = Recipe(
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        targets=None if targets == ALL_LINEAR else tuple(name.strip() for name in targets.split(",")),
        dropout=dropout,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        max_length=max_length,
        eval_share=eval_share,
        seed=seed,
        quantization=quantization,
        dtype=dtype,
    )
    _train(base, data, output, recipe)
    if publish and server:
        publish_to_server(publish, output, server, console)
    elif publish:
        adapters.publish(publish, output, store, base)


def _train(base: Path, data: Path, output: Path, recipe: Recipe) -> None:
    try:
        from onebase_server.tuning.run import train_adapter  # torch, Transformers and PEFT take seconds to import
    except ImportError as error:
        raise ConfigurationError(
            f"Training needs packages that are not installed ({error.name}): pip install 'onebase[tune]'."
        ) from error
    train_adapter(base, data, output, recipe, console)

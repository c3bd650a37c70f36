"""`onebase adapters merge`: several adapters of a store to one, published as any other, or folded into an int4 base."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from onebase_adapters.adapter import Adapter
from onebase_adapters.adapter_merging import (
    MergeMethod,
    MergeRecipe,
    SignElection,
    WeightedAdapter,
    merge_adapters,
)
from onebase_adapters.catalogue import AdapterVersion
from onebase_adapters.errors import InvalidMerge
from onebase_adapters.peft_stacks import stack_experts
from onebase_adapters.peft_writer import write_peft
from onebase_adapters.store import AdapterStore
from onebase_server.commands.store_access import (
    DEFAULT_STORE,
    StoreOption,
    console,
    open_store,
    read_adapter,
    require_base_of,
    resolve_reference,
    version_table,
    write_own_tokenizer,
)
from onebase_server.commands.upload import ServerOption, publish_to_server
from onebase_server.errors import ConfigurationError
from onebase_server.progress import step_progress

DEFAULTS = MergeRecipe()


def merge(
    name: Annotated[
        str, typer.Argument(help="Name to publish the merged adapter under; with --into-base the directory to write.")
    ],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE[=WEIGHT]…", help="Adapters (`name` or `name@version`); weights are 1 if left out."
        ),
    ],
    method: Annotated[
        MergeMethod, typer.Option(help="How updates are combined; cat is the exact sum, at the sum of the ranks.")
    ] = DEFAULTS.method,
    density: Annotated[
        float | None, typer.Option(help="Share of the numbers to keep (ties, dare_linear, dare_ties).")
    ] = DEFAULTS.density,
    majority_sign: Annotated[
        SignElection, typer.Option(help="What elects a sign: the sum, or the number of adapters (ties, dare_ties).")
    ] = DEFAULTS.sign_election,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the result of svd; by default the largest of the sources'.")
    ] = DEFAULTS.rank,
    seed: Annotated[int, typer.Option(min=0, help="Of what dare_linear and dare_ties drop.")] = DEFAULTS.seed,
    into_base: Annotated[
        Path | None,
        typer.Option(
            help="Fold QA-LoRA into this int4 base instead, exactly: write it with other minimums.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="Of int4, for an unquantised --into-base: the one it is served with.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    server: ServerOption = None,
) -> None:
    """Merge adapters of the store into a new one by PEFT's methods, and publish it as its name's next version."""
    with open_store(store) as opened:
        recipe = MergeRecipe(method=method, density=density, sign_election=majority_sign, rank=rank, seed=seed)
        parts = [_read_source(opened, source) for source in sources]
        _require_one_tokenizer([version for version, _ in parts])
        weighted = [WeightedAdapter(read_adapter(opened, version), weight) for version, weight in parts]
        with step_progress(f"Merging by {method}") as on_progress:
            merged = merge_adapters(weighted, recipe, on_progress)
        if into_base is not None:
            require_base_of(opened, into_base)
            _fold(merged, into_base, Path(name), group_size)
            write_own_tokenizer(opened, parts[0][0], Path(name))
            console.print(f"Wrote {name}.", highlight=False)
            return
        with opened.staging() as directory:
            write_peft(stack_experts(merged, opened.layout), directory, base_name=opened.base_name)
            write_own_tokenizer(opened, parts[0][0], directory)
            if server:
                publish_to_server(name, directory, server, console)
            else:
                console.print(version_table([opened.publish(name, directory)], title="Published"))


def _fold(merged: Adapter, base: Path, output: Path, group_size: int | None) -> None:
    from onebase_server.model.zero_point_merge import merge_into_base  # torch takes seconds to import

    with step_progress(f"Folding it into {base.name}") as on_progress:
        merge_into_base(base, merged, output, group_size, on_progress)


def _read_source(store: AdapterStore, source: str) -> tuple[AdapterVersion, float]:
    reference, _, weight = source.partition("=")
    try:
        return resolve_reference(store, reference), float(weight or 1)
    except ValueError as error:
        raise ConfigurationError(f"{source} should be an adapter and its weight, like pirate=0.7.") from error


def _require_one_tokenizer(versions: Sequence[AdapterVersion]) -> None:
    """Raise InvalidMerge for versions whose prompts are written in different ways."""
    for version in versions:
        if version.tokenizer_digest != versions[0].tokenizer_digest:
            raise InvalidMerge(
                f"{versions[0].label} and {version.label} cannot be merged: their tokenizers or chat templates differ."
            )

"""`onebase doctor --perplexity`: a base in each of its quantisations, one after another, on the user's own text."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

import onebase_kernels as kernels
from onebase_server.errors import ConfigurationError
from onebase_server.model.backend import use_kernels
from onebase_server.model.config import ModelConfig
from onebase_server.model.hub import resolve_base
from onebase_server.model.perplexity import Perplexity, measure_perplexity
from onebase_server.model.tokenizer import Tokenizer
from onebase_server.model.weight_report import WeightReport
from onebase_server.model.weights import load_decoder, resolve_device
from onebase_server.progress import step_progress
from onebase_server.settings import EngineSettings, QuantizationName, Settings

MAX_WINDOW = 2048
"""Tokens of a window unless `--max-model-len` says otherwise: what papers on quantisation measure with."""


class _Row(NamedTuple):
    quantization: str
    weights: WeightReport
    perplexity: Perplexity


def show_perplexities(file: Path, settings: Settings, chosen: str | None) -> None:
    """Measure and print; every quantisation there is, unless some are `chosen`, a list with commas.

    Raises:
        ConfigurationError: the file is no text or holds too little of it, or the base or a setting is wrong.
    """
    names = _read_choice(chosen)
    base = resolve_base(settings.base, settings.revision, settings.cache_dir)
    config = ModelConfig.from_directory(base)
    window = settings.max_model_len or min(config.max_context, MAX_WINDOW)
    if window < 2:
        raise ConfigurationError("--max-model-len should be at least 2: a token is predicted from those before it.")
    token_ids = _read_tokens(file, base)
    use_kernels(settings.kernels, resolve_device(settings.device))
    kernels.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
    engine = settings.engine.model_copy(update={"max_model_len": window})
    forms = {name: engine.model_copy(update={"quantization": name}) for name in names}
    if config.quantization is not None:  # it is loaded as it came, whatever the settings say
        forms = {config.quantization: engine}
    rows, failures = _measure_all(base, forms, token_ids)
    Console().print(_table(rows, f"{file.name}: {len(token_ids):,} tokens in windows of {window:,}"), *failures)


def _read_choice(chosen: str | None) -> list[str]:
    """The unquantised form first: the others are held against it."""
    offered = sorted(get_args(QuantizationName), key=lambda name: name != "none")
    if chosen is None:
        return offered
    names = {name.strip() for name in chosen.split(",")}
    if unknown := names.difference(offered):
        raise ConfigurationError(f"--quantization knows {', '.join(offered)}, but not {', '.join(sorted(unknown))}.")
    return [name for name in offered if name in names]


def _read_tokens(file: Path, base: Path) -> list[int]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{file} is no text in UTF-8 (byte {error.start}).") from error
    if "\0" in text:
        raise ConfigurationError(f"{file} is no text: it has bytes that are 0.")
    token_ids = Tokenizer.from_directory(base).encode(text)
    if not text.strip() or len(token_ids) < 2:
        raise ConfigurationError(f"{file} holds too little text: perplexity needs two tokens at least.")
    return token_ids


def _measure_all(
    base: Path, forms: Mapping[str, EngineSettings], token_ids: Sequence[int]
) -> tuple[list[_Row], list[str]]:
    """The rows of those forms that the base can have, and why not of the others; raises if it can have none."""
    rows, failures = [], []
    for name, settings in forms.items():
        try:
            rows.append(_measure(base, settings, name, token_ids))
        except ConfigurationError as error:
            failures.append(f"{name}: {error}")
    if not rows:
        raise ConfigurationError("\n".join(failures))
    return rows, failures


def _measure(base: Path, settings: EngineSettings, name: str, token_ids: Sequence[int]) -> _Row:
    with step_progress(f"Loading the base ({name})") as on_progress:
        decoder = load_decoder(base, settings, on_progress)
    with step_progress(f"Reading the text ({name})") as on_progress:
        perplexity = measure_perplexity(decoder, token_ids, on_progress)
    return _Row(name, decoder.weights.report(), perplexity)


def _table(rows: Sequence[_Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("quantisation")
    for heading in ("perplexity", "to none", "error", "bits a parameter", "weights", "tokens/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*_cells(row, unquantised=next((r for r in rows if not r.weights.is_quantized), None)))
    return table


def _cells(row: _Row, unquantised: _Row | None) -> Iterator[str]:
    yield row.quantization
    yield f"{row.perplexity.value:,.3f}"
    yield f"{row.perplexity.value / unquantised.perplexity.value:.4f}" if unquantised else "unknown"
    if row.weights.error is not None:
        yield f"{row.weights.error.relative:.2%}"
    else:
        yield "unknown" if row.weights.is_quantized else "none"
    yield f"{row.weights.bits_per_parameter:.3f}"
    yield decimal(row.weights.total_bytes)
    yield f"{row.perplexity.tokens_per_second:,.0f}"

"""How well a decoder predicts a text: its perplexity, over windows of the context that overlap by half.

It knows tokens, neither files nor tokenizers, and runs a decoder without engine or server.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from onebase_kernels import LoraBatch, StepInputs
from onebase_server.model.decoder import Decoder
from onebase_server.model.kv_cache import KvCache, allocate_kv_cache
from onebase_server.progress import OnProgress, ignore_progress

_BLOCK_SIZE = 16
_CHUNK = 256
"""Most tokens computed at a time: their logits are in memory together."""


@dataclass(frozen=True)
class Perplexity:
    """What a decoder made of a text."""

    value: float
    """e to the mean negative log-likelihood of the predicted tokens."""
    num_predicted: int
    tokens_per_second: float
    """Computed, those that are only context included."""


class Window(NamedTuple):
    """Tokens `start:stop`, computed together; those from `first` on are predicted."""

    start: int
    first: int
    stop: int


def windows(num_tokens: int, size: int) -> Iterator[Window]:
    """Windows of `size` ≥ 2 tokens, each half a window after the one before.

    So every token but the very first is predicted once, and all but those of the first window with at least half a
    window before them: the strided windows of Transformers' guide to perplexity of models with a fixed context, with
    half the context as stride.
    """
    predicted = 1
    for start in range(0, num_tokens, size // 2):
        stop = min(start + size, num_tokens)
        yield Window(start, predicted, stop)
        predicted = stop
        if stop == num_tokens:
            return


@torch.inference_mode()
def measure_perplexity(
    decoder: Decoder, token_ids: Sequence[int], on_progress: OnProgress = ignore_progress
) -> Perplexity:
    """The perplexity of at least two tokens, in windows of `decoder.max_model_len`; progress is in tokens."""
    tokens = torch.tensor(token_ids, device=decoder.device)
    plan = list(windows(len(token_ids), decoder.max_model_len))
    total = sum(window.stop - window.start for window in plan)
    num_blocks = -(-min(decoder.max_model_len, len(token_ids)) // _BLOCK_SIZE)
    kv_cache = allocate_kv_cache(decoder.config, num_blocks, _BLOCK_SIZE, decoder.dtype, decoder.device)
    loss, done, started = 0.0, 0, time.perf_counter()
    for window in plan:
        for start in range(window.start, window.stop, _CHUNK):
            stop = min(start + _CHUNK, window.stop)
            hidden = _compute(decoder, kv_cache, tokens[start:stop], start - window.start)
            loss += _loss(decoder, hidden, tokens, Window(start, window.first, min(stop + 1, window.stop)))
            done += stop - start
            on_progress(done, total)
    num_predicted = len(token_ids) - 1
    return Perplexity(math.exp(loss / num_predicted), num_predicted, total / (time.perf_counter() - started))


def _compute(decoder: Decoder, kv_cache: KvCache, tokens: Tensor, position: int) -> Tensor:
    """Hidden states of the tokens that follow `position` others of the same window."""
    positions = torch.arange(position, position + len(tokens), device=tokens.device)
    attention = kv_cache.attention_of_one(range(kv_cache.num_blocks), position, position + len(tokens))
    inputs = StepInputs(tokens, positions, attention, LoraBatch.empty(decoder.dtype, decoder.device))
    return decoder.forward(inputs, kv_cache)


def _loss(decoder: Decoder, hidden: Tensor, tokens: Tensor, chunk: Window) -> float:
    """Negative log-likelihood, summed, of those tokens of `chunk` that its hidden states predict and that count.

    The hidden state of token i predicts token i + 1.
    """
    first = max(chunk.first, chunk.start + 1)
    if first >= chunk.stop:
        return 0.0
    logits = decoder.compute_logits(hidden[first - 1 - chunk.start : chunk.stop - 1 - chunk.start])
    return float(cross_entropy(logits, tokens[first : chunk.stop], reduction="sum"))

"""Chooses the next token of each row from its logits.

A row's choice depends on its own logits, history, parameters and seed alone, never on the rows beside it: randomness is
one uniform number per (seed, position), pushed through the inverse of the cumulative distribution. It knows no batch
and no KV cache.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from onebase_server.engine.request import Logprob, SamplingParams
from onebase_server.engine.sequence import Sequence

GREEDY_BELOW = 1e-5
"""The temperature under which the best token is taken: dividing by less makes infinite logits, and these no text."""


def sample(logits: Tensor, sequences: Rows[Sequence]) -> list[int]:
    """One token id per row of `logits` [R, vocab] (float32, changed in place by penalties and temperature)."""
    for row, sequence in zip(logits, sequences, strict=True):
        apply_penalties_(row, sequence)
    tokens = logits.argmax(dim=-1)
    for rows, choose in (
        ([i for i, s in enumerate(sequences) if _is_random(s.sampling) and not _is_filtered(s.sampling)], _choose),
        ([i for i, s in enumerate(sequences) if _is_random(s.sampling) and _is_filtered(s.sampling)], _choose_filtered),
    ):
        if rows:
            params = [sequences[i].sampling for i in rows]
            scaled = logits[rows] / _column([p.temperature for p in params], logits)
            uniform = _column([uniform_number(sequences[i].seed, sequences[i].num_tokens) for i in rows], logits)
            tokens[rows] = choose(torch.softmax(scaled, dim=-1), uniform, params)
    return [int(token) for token in tokens.tolist()]


def apply_penalties_(logits: Tensor, sequence: Sequence) -> None:
    """Repetition penalty (CTRL, arXiv 1909.05858) over prompt and answer; presence and frequency over the answer.

    `logits` is one row [vocab], changed in place.
    """
    params = sequence.sampling
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list(set(sequence.token_ids)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.num_output_tokens:
        counts = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
        generated = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device)
        logits[generated] -= params.presence_penalty + params.frequency_penalty * times


def uniform_number(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the request's seed and the position to fill, and on nothing else."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def chosen_logprobs(logits: Tensor, token_ids: Rows[int], num_top: int) -> list[Logprob]:
    """Log-probabilities of the chosen tokens under raw `logits` [R, vocab], with the `num_top` best beside each."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(-1, torch.tensor(token_ids, device=logits.device).unsqueeze(-1)).squeeze(-1).tolist()
    best = logprobs.topk(num_top, dim=-1)
    return [
        Logprob(token_id=token_id, logprob=value, top=tuple(zip(ids, values, strict=True)))
        for token_id, value, ids, values in zip(
            token_ids, chosen, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def _is_random(params: SamplingParams) -> bool:
    return params.temperature >= GREEDY_BELOW


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(-1)


def _choose(probs: Tensor, uniform: Tensor, _: list[SamplingParams]) -> Tensor:
    """Inverse-CDF sampling over the whole vocabulary, [R, vocab] → [R]."""
    return _invert_cdf(probs, uniform)


def _choose_filtered(probs: Tensor, uniform: Tensor, params: list[SamplingParams]) -> Tensor:
    """The same over the tokens that survive top-k, then top-p (arXiv 1904.09751) and min-p (arXiv 2407.01082)."""
    probs, order = probs.sort(dim=-1, descending=True, stable=True)
    vocab = probs.shape[-1]
    ranks = torch.arange(vocab, device=probs.device)
    top_k = torch.tensor([p.top_k or vocab for p in params], device=probs.device).unsqueeze(-1)
    probs = probs.masked_fill(ranks >= top_k, 0.0)
    before = probs.cumsum(dim=-1, dtype=torch.float64) - probs
    kept_mass = probs.sum(dim=-1, keepdim=True)
    outside = (before >= _column([p.top_p for p in params], probs) * kept_mass) | (
        probs < _column([p.min_p for p in params], probs) * probs[:, :1]
    )
    outside[:, 0] = False
    return order.gather(-1, _invert_cdf(probs.masked_fill(outside, 0.0), uniform).unsqueeze(-1)).squeeze(-1)


def _invert_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """The first index at which the cumulative mass exceeds `uniform` of the total; a token of mass 0 is never it."""
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    return (
        torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        .squeeze(-1)
        .clamp_max(probs.shape[-1] - 1)
    )

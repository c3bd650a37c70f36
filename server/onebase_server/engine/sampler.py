"""The next token of each row: penalties, then the row's own parameters and random number.

A row's choice depends on its own logits, history, parameters and seed alone, never on the rows beside it: randomness is
one uniform number per (seed, position). How it chooses among the tokens is an op (`onebase_kernels.choose_tokens`).
"""

import hashlib
from collections import Counter
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import SamplingBatch
from onebase_server.engine.request import Logprob, SamplingParams
from onebase_server.engine.sequence import Sequence

GREEDY_BELOW = 1e-5
"""The temperature under which the best token is taken: dividing by less makes infinite logits, and these no text."""


def sample(logits: Tensor, sequences: Rows[Sequence]) -> list[int]:
    """One token id per row of `logits` [R, vocab] (fp32, changed in place by penalties)."""
    for row, sequence in enumerate(sequences):
        if _is_penalised(sequence.sampling):
            apply_penalties_(logits[row], sequence)
    tokens: list[int] = kernels.choose_tokens(logits, _sampling_batch(sequences, logits)).tolist()
    return tokens


def takes_best(params: SamplingParams) -> bool:
    """Whether the token is that of the largest logit, whatever the logits are."""
    return _is_greedy(params) and not _is_penalised(params)


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY_BELOW or params.top_k == 1


def _is_penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)


def _sampling_batch(sequences: Rows[Sequence], logits: Tensor) -> SamplingBatch:
    """The rows' parameters where the logits are: in one transfer, as fp64, which holds each of them."""
    parameters = torch.tensor([_parameters(sequence, logits.shape[1]) for sequence in sequences], dtype=torch.float64)
    columns = parameters.T.contiguous().to(logits.device, non_blocking=True)
    temperature, top_k, top_p, min_p, uniform = columns
    return SamplingBatch(temperature.float(), top_k.long(), top_p.float(), min_p.float(), uniform)


def _parameters(sequence: Sequence, vocab_size: int) -> tuple[float, ...]:
    """A row of a `SamplingBatch`."""
    params = sequence.sampling
    is_random = not _is_greedy(params)
    return (
        params.temperature if is_random else 0.0,
        min(params.top_k, vocab_size),
        params.top_p,
        params.min_p,
        uniform_number(sequence.seed, sequence.num_tokens) if is_random else 0.0,
    )


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

"""A request as the engine carries it: its tokens, its KV blocks and how far it has come.

Knows no torch, no scheduling policy and no socket.
"""

import secrets
from dataclasses import dataclass, field

from onebase_server.engine.request import AdapterRef, SamplingParams, Submit

NO_SLOT = -1
"""The adapter slot of a sequence that runs on the base alone."""


def find_last(wanted: tuple[int, ...], token_ids: tuple[int, ...]) -> int:
    """Where `wanted` begins for the last time in `token_ids`; -1 if it does not."""
    starts = range(len(token_ids) - len(wanted), -1, -1)
    return next((start for start in starts if token_ids[start : start + len(wanted)] == wanted), -1)


@dataclass(eq=False, slots=True)
class Sequence:
    """Progress is `num_tokens - num_computed_tokens`: what is known but not yet in the KV cache.

    A fresh prompt, a chunked prefill, a decode step and recomputation after a preemption differ in that number only.
    """

    request_id: str
    token_ids: list[int]
    """Prompt and answer so far."""
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    adapter: AdapterRef | None
    arrival: float
    """Monotonic seconds."""
    first_adapted: int = 0
    """The position from which on the adapter computes; the base alone computes those before it."""
    num_virtual_tokens: int = 0
    """How many positions the adapter's prefix takes, before those of `token_ids`."""
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Prefix-cache keys of the full blocks, as far as they were needed."""
    num_remembered_blocks: int = 0
    """How many blocks of `block_table` the prefix cache has been offered."""
    slot: int = NO_SLOT
    """The adapter's slot while the sequence runs."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache spared at the first admission."""
    first_scheduled: float | None = None
    times_passed: int = 0
    """How many sequences that came later were admitted before this one, for want of adapter memory."""

    @classmethod
    def from_submit(cls, message: Submit, arrival: float) -> "Sequence":
        """Start a sequence; without a seed of the client's it draws its own, so that a preemption repeats nothing."""
        seed = message.sampling.seed
        adapter, first_adapted = message.adapter, 0
        if adapter and adapter.invocation_tokens:
            first_adapted = find_last(adapter.invocation_tokens, message.prompt_token_ids)
            if first_adapted < 0:  # nothing calls the adapter
                adapter, first_adapted = None, 0
        return cls(
            request_id=message.request_id,
            token_ids=list(message.prompt_token_ids),
            num_prompt_tokens=len(message.prompt_token_ids),
            sampling=message.sampling,
            seed=secrets.randbits(63) if seed is None else seed,
            adapter=adapter,
            arrival=arrival,
            first_adapted=first_adapted,
            num_virtual_tokens=adapter.num_virtual_tokens if adapter else 0,
        )

    @property
    def num_tokens(self) -> int:
        """Positions known: the adapter's virtual tokens, prompt and answer so far."""
        return self.num_virtual_tokens + len(self.token_ids)

    def tokens_at(self, start: int, stop: int) -> list[int]:
        """The token ids at positions `start … stop - 1`; virtual tokens have none."""
        first = self.num_virtual_tokens
        return self.token_ids[max(0, start - first) : max(0, stop - first)]

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def adapter_digest(self) -> str | None:
        """The adapter's identity, None for the base."""
        return self.adapter.digest if self.adapter else None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt's log-probabilities are still to be reported, so that every position needs logits."""
        return self.sampling.prompt_logprobs is not None and self.num_output_tokens == 0

"""What crosses between the API process and the engine process: small frozen structs, no tensors, no pickle.

msgspec encodes them as tagged MessagePack; `protocol.py` frames them on a socket.
"""

import hashlib
from collections.abc import Sequence

import msgspec

from onebase_server.model.weight_report import WeightReport


class Struct(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of every message: immutable, keyword-only, tagged with its class name on the wire."""


class AdapterPart(msgspec.Struct, frozen=True, kw_only=True):
    """One version of an adapter, and how much of it."""

    digest: str
    """sha256 of the blob, hexadecimal."""
    path: str
    """Where the blob lies on this machine."""
    label: str
    """`name@version`, for messages and logs."""
    weight: float = 1.0


class AdapterRef(msgspec.Struct, frozen=True, kw_only=True):
    """What a request runs on beside the base, as it is pinned at admission: a version of an adapter, or several."""

    digest: str
    """The identity in memory and in the prefix cache: the blob's, or one of all parts and their weights."""
    parts: tuple[AdapterPart, ...]
    """One with the weight 1, or those of a weighted combination, which runs on the sum of their updates."""
    num_virtual_tokens: int = 0
    """How many positions of the context its prefix takes, before the prompt."""
    invocation_tokens: tuple[int, ...] = ()
    """Of aLoRA: it computes from their last occurrence in the prompt on; empty: from the beginning."""
    vocab_size: int | None = None
    """How many tokens it has; None for as many as the base."""

    @classmethod
    def of_version(
        cls,
        *,
        digest: str,
        path: str,
        label: str,
        num_virtual_tokens: int = 0,
        invocation_tokens: tuple[int, ...] = (),
        vocab_size: int | None = None,
    ) -> "AdapterRef":
        """One version by itself."""
        part = AdapterPart(digest=digest, path=path, label=label)
        return cls(
            digest=digest,
            parts=(part,),
            num_virtual_tokens=num_virtual_tokens,
            invocation_tokens=invocation_tokens,
            vocab_size=vocab_size,
        )

    @classmethod
    def combination(cls, parts: Sequence[AdapterPart]) -> "AdapterRef":
        """A weighted sum; the same parts in another order are the same."""
        ordered = tuple(sorted(parts, key=lambda part: part.digest))
        identity = msgspec.msgpack.encode([(part.digest, part.weight) for part in ordered])
        return cls(digest=hashlib.sha256(identity).hexdigest(), parts=ordered)

    @property
    def is_combination(self) -> bool:
        """Whether it is a weighted sum, be it of one."""
        return self.digest != self.parts[0].digest

    @property
    def label(self) -> str:
        """`name@version`, or `0.7*name@version+0.3*other@version`."""
        if self.is_combination:
            return "+".join(f"{part.weight}*{part.label}" for part in self.parts)
        return self.parts[0].label


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen; already validated by the API."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """Same seed, same text, whatever else is in the batch; None draws a fresh one."""
    stop_token_ids: tuple[int, ...] = ()
    """Any of these ends the text; the API puts the model's end-of-text tokens here unless they are to be ignored."""
    logprobs: int | None = None
    """How many alternatives to report beside each chosen token; None reports nothing, 0 the chosen token alone."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""


# From the API to the engine.


class Submit(Struct, frozen=True):
    """Generate one sequence."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None


class Abort(Struct, frozen=True):
    """Forget a request: its client went away, or a stop string was found in its text."""

    request_id: str


class Attach(Struct, frozen=True):
    """Bring an adapter into device memory ahead of its first request."""

    adapter: AdapterRef


class Retire(Struct, frozen=True):
    """An adapter version is no longer live: free its memory once its last request has ended."""

    digest: str


# From the engine to the API.


class Logprob(msgspec.Struct, frozen=True, kw_only=True):
    """One token's log-probability after temperature-free log-softmax of the raw logits, as OpenAI reports it."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely alternatives, best first: (token id, log-probability)."""


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step added to one request."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] | None = None
    """One per token of `token_ids`, if asked for."""
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    """Sent once, with the first token; the first entry is None, for nothing precedes it."""
    finish_reason: str | None = None
    """`stop` (one of `stop_token_ids`), `length` or `error`; None while it goes on."""
    stop_token_id: int | None = None
    """The token that ended the text with `stop`; it is the last of `token_ids`."""
    error: str | None = None
    """With `error`: a sentence for the client."""
    num_cached_tokens: int = 0
    """With the first output: how many prompt tokens the prefix cache spared."""
    queue_seconds: float | None = None
    """With the first output: from arrival in the engine to the first step it took part in."""


class EngineMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process holds, by part, in bytes; on a CPU the parts add up to its resident memory."""

    weights: int = 0
    """Codes and scales, embedding, head and its screen, norms and biases."""
    kv_cache: int = 0
    """Blocks that have been in use at least once."""
    adapters: int = 0
    """The arena up to the highest place that has held an adapter, and the tables."""
    activations: int = 0
    """Of a recorded step, where the back end records."""
    runtime: int = 0
    """The rest of the process: code, Python, torch, buffers that come and go."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's state after a step; counters count from the engine's start."""

    running: int = 0
    waiting: int = 0
    batch_tokens: int = 0
    """Tokens of this step."""
    batch_requests: int = 0
    """Requests of this step."""
    distinct_adapters: int = 0
    """Different adapters in this step."""
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens looked up."""
    prefix_cache_hits: int = 0
    """Prompt tokens found."""
    adapter_bytes_used: int = 0
    adapter_bytes_total: int = 0
    adapters_resident: int = 0
    adapter_attaches: int = 0
    adapter_evictions: int = 0
    preemptions: int = 0
    step_seconds: float = 0.0
    running_adapters: tuple[str, ...] = ()
    """Labels of the adapters of running requests."""
    waiting_adapters: tuple[str, ...] = ()
    memory: EngineMemory = EngineMemory()


class StepOutputs(Struct, frozen=True):
    """Everything that one step produced."""

    outputs: tuple[TokenOutput, ...]
    stats: EngineStats


class Attached(Struct, frozen=True):
    """The answer to `Attach`."""

    digest: str
    seconds: float = 0.0
    """From reading the blob to the tables switched over, waiting for the step in progress included."""
    error: str | None = None


class Ready(Struct, frozen=True):
    """The engine has loaded the base and can take requests."""

    vocab_size: int
    max_model_len: int
    """Most tokens of prompt and answer together, bounded by the context and by the KV cache."""
    adapter_bytes_total: int
    adapter_element_bytes: int
    """Bytes that one number of an adapter takes on the device at least."""
    quantization: str
    weights: WeightReport
    stats: EngineStats


class Failed(Struct, frozen=True):
    """The engine could not start; the text says why."""

    error: str


ToEngine = Submit | Abort | Attach | Retire
FromEngine = StepOutputs | Attached | Ready | Failed

"""The list of what is timed: every op of onebase_kernels, on each shape that a decoder calls it with.

`adapted_linear` is three of them together, as a linear with adapters is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from onebase_server.bench.kernels import attention_cases, elementwise_cases, linear_cases, sampling_cases
from onebase_server.bench.kernels.trial import Trial
from onebase_server.bench.kernels.workbench import Workbench
from onebase_server.errors import ConfigurationError
from onebase_server.model.config import ModelConfig


@dataclass(frozen=True)
class Case:
    """One op on one shape, whatever the number of rows."""

    op: str
    variant: str
    trials: Callable[[Workbench], Iterator[Trial]]
    """One for each of the workbench's rows, in their order."""


def list_cases(config: ModelConfig, ops: Sequence[str]) -> list[Case]:
    """The cases of these ops, or of all.

    Raises:
        ConfigurationError: there is no such op.
    """
    products = (
        linear_cases.quantized_linear,
        linear_cases.dense_linear,
        linear_cases.add_lora_,
        linear_cases.adapted_linear,
    )
    every = [
        *(Case(op.__name__, group.name, partial(op, group)) for op in products for group in config.distinct_groups),
        Case("write_kv_", "", attention_cases.write_kv_),
        Case("paged_attention", "decode", attention_cases.decode_attention),
        Case("paged_attention", "prefill", attention_cases.prefill_attention),
        Case("embed", "", elementwise_cases.embed),
        Case("rms_norm", "", elementwise_cases.rms_norm),
        Case("add_rms_norm_", "", elementwise_cases.add_rms_norm_),
        Case("layer_norm", "", elementwise_cases.layer_norm),
        Case("add_", "", elementwise_cases.add_),
        Case("apply_rope_", "", elementwise_cases.apply_rope_),
        Case("silu_mul", "", elementwise_cases.silu_mul),
        Case("gelu_mul", "", elementwise_cases.gelu_mul),
        Case("head_logits", "bf16", linear_cases.head_logits),
        Case("head_logits", "nf4", linear_cases.nf4_head_logits),
        Case("best_tokens", "bf16", linear_cases.best_tokens),
        Case("softcap_", "", sampling_cases.softcap_),
        Case("choose_tokens", "greedy", sampling_cases.greedy),
        Case("choose_tokens", "top-p", sampling_cases.top_p),
    ]
    known = list(dict.fromkeys(case.op for case in every))
    if unknown := set(ops) - set(known):
        raise ConfigurationError(f"--ops: there is no op {', '.join(sorted(unknown))}. There are {', '.join(known)}.")
    return [case for case in every if not ops or case.op in ops]

"""A PEFT LoRA adapter to the canonical form: LoRA, rsLoRA, DoRA, QA-LoRA, and what each of them does with biases.

What else such an adapter has of embedding and head is `peft_vocabulary`'s business.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import regex

from .adapter import Adapter, Array, Epilogue, LowRankPair, ModuleKey, Vocabulary
from .base_layout import BaseLayout
from .base_vectors import BaseVectors
from .errors import InvalidConfig, InvalidTensors, RankTooLarge, UnsupportedAdapter
from .peft_config import (
    CONFIG_FILE,
    PROVENANCE,
    choice,
    compile_pattern,
    finite_number,
    flag,
    match_pattern,
    positive_integer,
    refuse_options_beyond,
)
from .peft_norms import norm_modules, read_norms, split_norms
from .peft_stacks import unstack
from .peft_targets import TARGET_OPTIONS, ModuleNames, Targets
from .peft_tensors import ADAPTER_NAME, ModuleTensors, NamedTensors, group_by_module
from .peft_vocabulary import (
    EMBEDDING,
    MODULES,
    VOCABULARY_OPTIONS,
    Found,
    VocabularyOptions,
    read_vocabulary,
    split_vocabulary,
    vocabulary_size,
)

HONOURED = frozenset(
    {
        *TARGET_OPTIONS,
        *VOCABULARY_OPTIONS,
        "alora_invocation_tokens",
        "alpha_pattern",
        "bias",
        "lora_alpha",
        "lora_bias",
        "peft_type",
        "qalora_group_size",
        "qalora_pooling",
        "r",
        "rank_pattern",
        "target_parameters",
        "use_dora",
        "use_qalora",
        "use_rslora",
    }
)

WITHOUT_EFFECT = PROVENANCE | {
    # how it was trained
    "corda_config",
    "eva_config",
    "init_lora_weights",  # what is not plain is refused
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "runtime_config",
    "velora_config",
    # how weights lie in layers that are not linear; PEFT switches it off for those that are
    "fan_in_fan_out",
}
"""Options that leave the answers of a finished adapter alone."""

PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base alone; the others subtract the first s·BA from its weights."""

TENSORS = {
    "lora_A": rf"lora_A{ADAPTER_NAME}\.weight",
    "lora_B": rf"lora_B{ADAPTER_NAME}\.weight",
    "lora_bias": rf"lora_B{ADAPTER_NAME}\.bias",
    "lora_magnitude_vector": rf"lora_magnitude_vector{ADAPTER_NAME}(?:\.weight)?",
    "bias": r"(?:base_layer\.)?bias",
}
"""Kinds of tensors to what their names end in."""

Number = TypeVar("Number", int, float)
Patterns = tuple[tuple["regex.Pattern[str]", Number], ...]
"""Patterns of module names and what they map to, in the file's order: the first that matches counts."""


@dataclass(frozen=True)
class LoraOptions:
    """What `adapter_config.json` says that matters to answers."""

    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    trains_bias: bool
    """Whether some of the base's biases are replaced: `bias` is `all` or `lora_only`."""
    pooling: "Pooling | None"
    invocation_tokens: tuple[int, ...]
    """Of aLoRA; empty without."""
    rank_pattern: Patterns[int]
    alpha_pattern: Patterns[float]
    targets: Targets
    target_parameters: ModuleNames
    """Parameters that are adapted; each weight is a module's own, or stacked of all experts."""
    vocabulary: VocabularyOptions

    @property
    def beyond_lora(self) -> str | None:
        """The option that makes more of each module than plain LoRA does, if one is on."""
        named = (("use_dora", self.use_dora), ("lora_bias", self.lora_bias), ("use_qalora", self.pooling))
        return next((name for name, is_on in named if is_on), None)

    def rank(self, module: str) -> int:
        """The rank of a module, named as in the base model: `model.layers.3.self_attn.q_proj`."""
        return _look_up(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """alpha / rank, or alpha / √rank for rsLoRA (arXiv 2312.03732)."""
        rank, alpha = self.rank(module), _look_up(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True)
class Pooling:
    """QA-LoRA (arXiv 2309.14717): A takes one number for each group of inputs.

    In the paper that is the group's sum. PEFT's `use_qalora` takes the group's mean times the number of groups, which
    is the sum times groups / group size. Either way A, each column repeated for its group's inputs, is plain LoRA's.
    """

    group_size: int
    is_sum: bool
    """Whether it is the paper's sum."""

    def num_groups(self, module: ModuleTensors) -> int:
        """How many groups the module's inputs are; raises InvalidConfig if they leave a rest."""
        if module.in_features % self.group_size:
            raise InvalidConfig(
                f"{CONFIG_FILE}: qalora_group_size {self.group_size} does not divide the {module.in_features} inputs "
                f"of {module.name}."
            )
        return module.in_features // self.group_size

    def factor(self, module: ModuleTensors) -> float:
        """What a group's sum is multiplied by."""
        return 1.0 if self.is_sum else self.num_groups(module) / self.group_size


def read_lora(
    config: dict[str, Any],
    tensors: Mapping[str, Array],
    layout: BaseLayout,
    *,
    max_rank: int,
    base: BaseVectors | None = None,
) -> Adapter:
    """Check an adapter of `peft_type` LORA against the base.

    Raises:
        InvalidConfig: a field of `adapter_config.json` makes no sense; the text names it.
        UnsupportedAdapter: it asks for an option that is not carried; the text names it.
        InvalidTensors: a tensor, which the text names, is missing, too much or does not fit.
        RankTooLarge: a module's rank is over `max_rank`.
    """
    options = read_options(config)
    pairs: dict[ModuleKey, LowRankPair] = {}
    epilogues: dict[ModuleKey, Epilogue] = {}
    options.vocabulary.require_carried(norm_modules(layout))
    norm_tensors, tensors = split_norms(tensors, layout)
    norms = read_norms(norm_tensors, options.vocabulary.modules_to_save, layout, trains_bias=options.trains_bias)
    outer, inner = split_vocabulary(tensors)
    vocabulary = _vocabulary(outer, options, layout, base, max_rank)
    is_empty = not (inner or vocabulary or norms)
    modules = group_by_module(inner, TENSORS, layout, options.target_parameters) if inner or is_empty else []
    for module in chain.from_iterable(map(unstack, modules)):
        if _is_targeted(module):
            if not module.is_parameter:
                options.targets.require(module.name)
            for key, pair in _pairs(module, options, max_rank).items():
                if key in pairs:
                    raise InvalidTensors(f"{key} has two pairs of tensors, one of its own and one in a fused module.")
                pairs[key] = pair
        epilogues |= _epilogues(module, options)
    return Adapter(pairs, epilogues, vocabulary=vocabulary, norms=norms, invocation_tokens=options.invocation_tokens)


def read_options(config: dict[str, Any]) -> LoraOptions:
    """Check what `load_config` read of a LoRA adapter; raises InvalidConfig or UnsupportedAdapter."""
    _refuse_other_bases(config)
    refuse_options_beyond(HONOURED | WITHOUT_EFFECT, config)
    options = LoraOptions(
        r=positive_integer(config.get("r"), "r"),
        lora_alpha=finite_number(config.get("lora_alpha"), "lora_alpha"),
        use_rslora=flag(config, "use_rslora"),
        use_dora=flag(config, "use_dora"),
        lora_bias=flag(config, "lora_bias"),
        trains_bias=choice(config, "bias", ("none", "all", "lora_only"), "none") != "none",
        pooling=_pooling(config),
        invocation_tokens=_invocation_tokens(config.get("alora_invocation_tokens")),
        rank_pattern=_patterns(config, "rank_pattern", positive_integer),
        alpha_pattern=_patterns(config, "alpha_pattern", finite_number),
        targets=Targets.read(config),
        target_parameters=_target_parameters(config),
        vocabulary=VocabularyOptions.read(config),
    )
    if options.use_dora and (options.lora_bias or options.pooling):
        other = "lora_bias" if options.lora_bias else "use_qalora"
        raise UnsupportedAdapter(f"{CONFIG_FILE} asks for both use_dora and {other}, which PEFT does not combine.")
    if options.invocation_tokens and (options.use_dora or options.pooling or options.trains_bias):
        other = "use_dora" if options.use_dora else "use_qalora" if options.pooling else "bias"
        raise UnsupportedAdapter(
            f"{CONFIG_FILE} asks for both alora_invocation_tokens and {other}, which this server does not combine."
        )
    if options.target_parameters.names:
        for other in ("use_dora", "use_qalora", "lora_bias", "alora_invocation_tokens"):
            if config.get(other):
                raise UnsupportedAdapter(
                    f"{CONFIG_FILE} asks for both target_parameters and {other}, which PEFT does not combine."
                )
    return options


def _target_parameters(config: dict[str, Any]) -> ModuleNames:
    if isinstance(config.get("target_parameters"), str):
        raise InvalidConfig(f"{CONFIG_FILE}: target_parameters should be a list of names, not a pattern.")
    return ModuleNames.read(config, "target_parameters")


def _invocation_tokens(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not value or not all(type(token) is int and token >= 0 for token in value):
        raise InvalidConfig(f"{CONFIG_FILE}: alora_invocation_tokens should be a list of token ids, not {value!r}.")
    return tuple(value)


def _refuse_other_bases(config: dict[str, Any]) -> None:
    initialisation = config.get("init_lora_weights")
    if initialisation not in PLAIN_INITIALISATIONS:
        if initialisation == "loftq":
            remedy = "Use PEFT's replace_lora_weights_loftq, which starts from the quantised base as it is."
        else:
            remedy = "Save it with path_initial_model_for_weight_conversion, which turns it into a plain LoRA."
        raise UnsupportedAdapter(
            f"init_lora_weights {initialisation!r} changes the base's weights, so this adapter does not fit the "
            f"original base. {remedy}"
        )


def _pooling(config: dict[str, Any]) -> Pooling | None:
    is_sum = choice(config, "qalora_pooling", ("mean", "sum"), "mean") == "sum"
    if not flag(config, "use_qalora"):
        return None
    return Pooling(positive_integer(config.get("qalora_group_size"), "qalora_group_size"), is_sum)


def _patterns(config: dict[str, Any], name: str, check: Callable[[object, str], Number]) -> Patterns[Number]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise InvalidConfig(f"{CONFIG_FILE}: {name} should map module patterns to numbers, not be {patterns!r}.")
    return tuple(
        # PEFT's own expression: the pattern has to match the whole name, or the whole last parts of it
        (compile_pattern(rf"(.*\.)?({pattern})$", name), check(value, f"{name}[{pattern!r}]"))
        for pattern, value in patterns.items()
    )


def _look_up(patterns: Patterns[Number], module: str, default: Number) -> Number:
    return next((value for pattern, value in patterns if match_pattern(pattern, module)), default)


def _is_targeted(module: ModuleTensors) -> bool:
    """Whether there is more than a bias: `bias: all` trains those of other modules too."""
    return module.tensors.keys() != {"bias"}


def _pairs(module: ModuleTensors, options: LoraOptions, max_rank: int) -> dict[ModuleKey, LowRankPair]:
    """The module's pair; for a fused one the pair of each projection, which share A and divide B's rows."""
    pooling = options.pooling
    num_columns = pooling.num_groups(module) if pooling else module.in_features
    pair = _pair(module, num_columns, module.out_features, options, max_rank)
    lora_a, scale = pair.lora_a, pair.scale
    if pooling:
        lora_a, scale = lora_a.repeat(pooling.group_size, axis=1), scale * pooling.factor(module)
    return {key: LowRankPair(lora_a, rows, scale) for key, rows in module.divide(pair.lora_b)}


def _pair(
    module: NamedTensors, in_features: int, out_features: int, options: LoraOptions, max_rank: int
) -> LowRankPair:
    rank = options.rank(module.name)
    if rank > max_rank:
        raise RankTooLarge(f"{module.name} has rank {rank}, but this server allows at most {max_rank}.")
    lora_a, lora_b = module.take("lora_A", rank, in_features), module.take("lora_B", out_features, rank)
    if lora_a.dtype != lora_b.dtype:
        raise InvalidTensors(f"{module.name} has lora_A in {lora_a.dtype} but lora_B in {lora_b.dtype}.")
    return LowRankPair(lora_a, lora_b, options.scale(module.name))


def _vocabulary(
    found: Found, options: LoraOptions, layout: BaseLayout, base: BaseVectors | None, max_rank: int
) -> Vocabulary | None:
    """What becomes of embedding and head; None if nothing does."""
    if not options.vocabulary.is_any and not any(module.tensors for module in found.values()):
        return None
    if options.invocation_tokens:
        raise UnsupportedAdapter(
            f"{CONFIG_FILE} asks for alora_invocation_tokens, which this server does not combine with changes of "
            "embed_tokens, lm_head or norms (target_modules, modules_to_save, trainable_token_indices, resized "
            "vocabularies)."
        )
    size = vocabulary_size(found, options.vocabulary, layout)
    pairs: dict[str, LowRankPair] = {}
    for matrix, module in found.items():
        if not module.has_pair:
            continue
        if options.targets.target_modules is None:
            raise InvalidTensors(f"There are tensors for {module.name}, but target_modules does not name it.")
        # a head that is tied by force has tensors where the embedding is named
        options.targets.require(MODULES[EMBEDDING] if options.vocabulary.ties and layout.is_tied else module.name)
        if option := options.beyond_lora:
            raise UnsupportedAdapter(
                f"{CONFIG_FILE} asks for {option}, which this server does not combine with LoRA on {module.name}."
            )
        pairs[matrix] = _pair(module, *module.features(size, layout), options, max_rank)
    return read_vocabulary(found, pairs, size, options.vocabulary, layout, base)


def _epilogues(module: ModuleTensors, options: LoraOptions) -> dict[ModuleKey, Epilogue]:
    """What follows the update of each of the module's projections; empty for plain LoRA."""
    is_on = {"lora_magnitude_vector": options.use_dora, "lora_bias": options.lora_bias, "bias": options.trains_bias}
    for kind, (name, _) in module.tensors.items():
        if not is_on.get(kind, True):
            raise InvalidTensors(f"There is {name}, but {CONFIG_FILE} has the option off that it belongs to.")
    vectors: dict[str, Array] = {}
    if options.trains_bias and "bias" in module.tensors:  # many linears have none that could be trained
        vectors["bias"] = module.take("bias", module.out_features)
    if options.use_dora and _is_targeted(module):
        vectors["magnitude"] = module.take("lora_magnitude_vector", module.out_features)
    if options.lora_bias and _is_targeted(module):
        lora_bias = module.take("lora_bias", module.out_features).astype(np.float32)
        vectors["shift"] = lora_bias * np.float32(options.scale(module.name))  # PEFT scales it as it scales BA x
    divided: dict[ModuleKey, dict[str, Array]] = {}
    for name, vector in vectors.items():
        for key, part in module.divide(vector):
            divided.setdefault(key, {})[name] = part
    return {key: Epilogue(**parts) for key, parts in divided.items()}

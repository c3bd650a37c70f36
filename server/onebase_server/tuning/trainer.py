"""LoRA on a frozen, NF4-quantised base (QLoRA, arXiv 2305.14314): Transformers, PEFT and bitsandbytes do the work.

It knows no files but the base's and prints nothing: `Trainer` yields a `Step` at a time, and whoever iterates draws it.
"""

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from onebase_server.errors import ConfigurationError
from onebase_server.tuning.examples import Example
from onebase_server.tuning.recipe import Recipe

_IGNORED = -100
"""The label that Transformers' losses leave out."""
_MAX_GRADIENT_NORM = 1.0
_BATCHES_PER_BUCKET = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimiser step."""

    loss: float
    """Mean over the answer tokens of the batch, in nats."""
    learning_rate: float
    num_tokens: int
    """Tokens of the batch, prompts included, padding not."""
    num_answer_tokens: int
    """Tokens that carry loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Mean losses of an epoch over answer tokens, in nats."""

    training: float
    held_out: float | None = None
    """None if no examples are held out."""

    def __str__(self) -> str:
        training = f"loss {self.training:.4f}"
        return training if self.held_out is None else f"{training}, held-out loss {self.held_out:.4f}"


def mean_loss(steps: Sequence[Step]) -> float:
    """The loss over all answer tokens of these steps."""
    return sum(step.loss * step.num_answer_tokens for step in steps) / sum(step.num_answer_tokens for step in steps)


def load_base(directory: Path, recipe: Recipe) -> PreTrainedModel:
    """The base with its linears in NF4 under double quantisation, on the GPU if there is one.

    A checkpoint that came quantised is taken as it is.

    Raises:
        ConfigurationError: `directory` holds no model that Transformers can load, or a package is missing for it.
    """
    dtype: torch.dtype = getattr(torch, recipe.dtype)
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        quantise = recipe.quantization == "nf4" and "quantization_config" not in config
        if quantise and find_spec("bitsandbytes") is None:
            raise ConfigurationError(
                "Training on a base in NF4 needs the package bitsandbytes, which is not installed; with "
                "`--quantization none` the base stays as it is."
            )
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
            local_files_only=True,
            # an explicit None would override what a quantised checkpoint says of itself
            **({"quantization_config": _nf4(dtype)} if quantise else {}),
        )
    except (ImportError, OSError, ValueError) as error:
        raise ConfigurationError(f"The base in {directory} cannot be loaded: {error}.") from error
    model.config.use_cache = False
    return model


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def add_lora(base: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """The base, frozen, with fresh LoRA matrices drawn from the recipe's seed.

    Raises:
        ConfigurationError: The base has no linear of a target's name.
    """
    names = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    if unknown := set(recipe.targets or ()) - names:
        raise ConfigurationError(
            f"The base has no linear called {', '.join(sorted(unknown))}; it has {', '.join(sorted(names))}."
        )
    set_seed(recipe.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora,
        target_modules="all-linear" if recipe.targets is None else list(recipe.targets),
    )
    return get_peft_model(base, config)


def hold_out(examples: Sequence[Example], recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those only to measure: a share of them, drawn by the seed.

    Raises:
        ConfigurationError: A share was asked for that would leave one of the two empty.
    """
    shuffled = random.Random(recipe.seed).sample(examples, len(examples))
    num_held_out = round(recipe.eval_share * len(examples))
    if recipe.eval_share and not 0 < num_held_out < len(examples):
        raise ConfigurationError(
            f"Holding out {recipe.eval_share:.0%} of {len(examples)} example(s) leaves nothing to train on or nothing "
            "to measure; add examples or change --eval-share."
        )
    return shuffled[num_held_out:], shuffled[:num_held_out]


class Trainer:
    """AdamW under a cosine with warm-up, over the LoRA matrices of `model`, which change in place."""

    def __init__(self, model: PeftModel, examples: Sequence[Example], recipe: Recipe) -> None:
        self.model = model
        self.examples = examples
        self.batch_size = recipe.batch_size
        self.num_steps = recipe.epochs * math.ceil(len(examples) / recipe.batch_size)
        self._rng = random.Random(recipe.seed)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self._schedule = get_cosine_schedule_with_warmup(
            self._optimizer, round(recipe.warmup * self.num_steps), self.num_steps
        )

    def run_epoch(self) -> Iterator[Step]:
        """Go through the examples once, one optimiser step per item.

        Raises:
            ConfigurationError: The loss is no longer finite.
        """
        self.model.train()
        for batch in _batches_of_similar_length(self.examples, self.batch_size, self._rng):
            yield self._step(batch)

    def _step(self, batch: Sequence[Example]) -> Step:
        loss = self.model(**_collate(batch, self.model.device)).loss
        if not torch.isfinite(loss):
            raise ConfigurationError("The loss is no longer a finite number; lower --learning-rate.")
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, _MAX_GRADIENT_NORM)
        learning_rate = self._schedule.get_last_lr()[0]
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return Step(
            loss=loss.item(),
            learning_rate=learning_rate,
            num_tokens=sum(len(example.token_ids) for example in batch),
            num_answer_tokens=_num_answer_tokens(batch),
        )


@torch.inference_mode()
def evaluate(model: PeftModel, examples: Sequence[Example], batch_size: int) -> float:
    """Mean loss over the answer tokens of `examples`, in nats; `model` can be trained on afterwards.

    Only dropout is switched off: in evaluation mode bitsandbytes repacks NF4 weights for AVX-512 in place, and its
    product with the repacked form has no gradient.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    ordered = sorted(examples, key=lambda example: len(example.token_ids))
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    total = sum(model(**_collate(batch, model.device)).loss.item() * _num_answer_tokens(batch) for batch in batches)
    return float(total) / _num_answer_tokens(examples)


def _batches_of_similar_length(examples: Sequence[Example], batch_size: int, rng: random.Random) -> list[list[Example]]:
    """Every example once, in random batches that need little padding: only within a shuffled bucket is sorted."""
    shuffled = rng.sample(examples, len(examples))
    bucket_size = batch_size * _BATCHES_PER_BUCKET
    batches = []
    for start in range(0, len(shuffled), bucket_size):
        bucket = sorted(shuffled[start : start + bucket_size], key=lambda example: len(example.token_ids))
        batches += [bucket[first : first + batch_size] for first in range(0, len(bucket), batch_size)]
    rng.shuffle(batches)
    return batches


def _collate(batch: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each [examples, longest], padded on the right."""
    longest = max(len(example.token_ids) for example in batch)
    shape = (len(batch), longest)
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, _IGNORED)
    for row, example in enumerate(batch):
        length = len(example.token_ids)
        token_ids = torch.tensor(example.token_ids)
        input_ids[row, :length] = token_ids
        attention_mask[row, :length] = 1
        labels[row, :length] = token_ids.where(torch.tensor(example.loss_mask), _IGNORED)
    return {
        "input_ids": input_ids.to(device),
        "attention_mask": attention_mask.to(device),
        "labels": labels.to(device),
    }


def _num_answer_tokens(examples: Iterable[Example]) -> int:
    return sum(sum(example.loss_mask) for example in examples)

"""Adapters that change embedding, head or the vocabulary's size are what PEFT makes of them, alone and in one batch.

The bases are NF4, one with a head of its own and one whose head is its embedding; log-probabilities within 1e-4
relative over the adapter's whole vocabulary, in fp32.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    StableLmConfig,
)

from onebase_adapters.store import AdapterStore
from onebase_kernels import BackendName
from onebase_server.engine.core import Engine
from onebase_server.engine.request import AdapterRef, Retire, SamplingParams, Submit, TokenOutput
from onebase_server.model.config import ModelConfig

from ..random_numbers import randomize
from .conftest import SMALL, VOCAB, Oracle, load_nf4, publish
from .test_adapter_kinds import start_engine
from .test_mixed_batch import prompt_of, run

ANSWER = 6
ADDED = 7
Q_PROJ = ["q_proj", "v_proj"]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": Q_PROJ, "use_dora": True, "modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["lm_head", *Q_PROJ], "rank_pattern": {"lm_head": 3}, "alpha_pattern": {"lm_head": 5}},
    "embedding": {"target_modules": ["embed_tokens", *Q_PROJ], "use_rslora": True},
    "embedding-alone": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "down_proj"]},
    "tying": {"target_modules": ["embed_tokens", *Q_PROJ], "ensure_weight_tying": True},
    "tokens": {"target_modules": Q_PROJ, "trainable_token_indices": list(range(200, 20, -3))},
    "tokens-of-head": {"target_modules": Q_PROJ, "trainable_token_indices": {"lm_head": [7, 90, 3]}},
    "tokens-of-each": {
        "target_modules": Q_PROJ,
        "trainable_token_indices": {"embed_tokens": list(range(100)), "lm_head": [5, 6]},
    },
    "saved-embedding": {"target_modules": Q_PROJ, "modules_to_save": ["embed_tokens"]},
    "saved-head": {"target_modules": Q_PROJ, "modules_to_save": ["lm_head"]},
    "saved-both": {"target_modules": Q_PROJ, "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved-tying": {
        "target_modules": Q_PROJ,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}
NORMS = ["input_layernorm", "post_attention_layernorm", "model.norm"]
KINDS |= {
    "norms": {"target_modules": Q_PROJ, "modules_to_save": NORMS},
    "last-norm": {"target_modules": "all-linear", "modules_to_save": ["model.norm", "lm_head"]},
}
RESIZED: dict[str, dict[str, Any]] = {
    "resized": {"target_modules": Q_PROJ},
    "resized-tokens": {"target_modules": Q_PROJ, "trainable_token_indices": [VOCAB + 3, 9, *range(VOCAB, VOCAB + 3)]},
    "resized-saved": {"target_modules": Q_PROJ, "modules_to_save": ["embed_tokens", "lm_head"]},
    "resized-lora": {"target_modules": [*Q_PROJ, "embed_tokens", "lm_head"]},
}
SHRUNK = {"shrunk": {"target_modules": Q_PROJ}}
"""Resizing to the tokenizer's length makes a vocabulary smaller that was filled up to a round number."""


@dataclass(frozen=True)
class Scene:
    """A base, its adapters, and what PEFT says of them."""

    base: Path
    store: AdapterStore
    oracle: Oracle
    adapters: dict[str, AdapterRef]


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Every kind, its numbers random, saved by PEFT and published."""
    root = tmp_path_factory.mktemp("vocabularies")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=request.param)).save_pretrained(root / "base")
    models = {
        name: save_kind(root, name, options, size)
        for kinds, size in ((KINDS, VOCAB), (RESIZED, VOCAB + ADDED), (SHRUNK, VOCAB - 20))
        for name, options in kinds.items()
    }
    layout = ModelConfig.from_directory(root / "base").adapter_layout()
    store = AdapterStore.open(root / "store", layout, base_name="small", base_directory=root / "base")
    adapters = {name: publish(store, name, root / name) for name in models}
    yield Scene(root / "base", store, Oracle(models, root), adapters)
    store.close()


def save_kind(root: Path, name: str, options: dict[str, Any], size: int) -> PeftModel:
    model = load_nf4(root / "base")
    if size != VOCAB:
        model.resize_token_embeddings(size)
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **options), adapter_name=name)
    randomize(model)
    model.save_pretrained(root)
    return model.eval()


def prompt(name: str, adapter: AdapterRef | None) -> tuple[int, ...]:
    """A prompt of the row's own, with added tokens where the adapter has some."""
    size = adapter.vocab_size if adapter and adapter.vocab_size else VOCAB
    return (*(token % size for token in prompt_of(name)), *range(VOCAB, size))


def submit(engine: Engine, name: str, adapter: AdapterRef | None) -> None:
    size = adapter.vocab_size if adapter and adapter.vocab_size else VOCAB
    sampling = SamplingParams(max_tokens=ANSWER, temperature=0.0, logprobs=size, prompt_logprobs=size)
    engine.handle(Submit(request_id=name, prompt_token_ids=prompt(name, adapter), sampling=sampling, adapter=adapter))


def assert_like_oracle(outputs: list[TokenOutput], name: str, scene: Scene) -> None:
    adapter = scene.adapters.get(name)
    expected_tokens, expected = scene.oracle.answer(prompt(name, adapter), name if adapter else None, ANSWER)
    assert [token for output in outputs for token in output.token_ids] == expected_tokens, f"{name}: another text"
    reports = [report for output in outputs for report in output.logprobs or ()]
    assert len(reports) == ANSWER
    for position, report in enumerate(reports):
        ours = dense(report.top, expected.shape[1])
        error = (ours - expected[position]).norm() / expected[position].norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e} at answer token {position}"


def dense(top: tuple[tuple[int, float], ...], size: int) -> Tensor:
    logprobs = torch.empty(size)
    for token, logprob in top:
        logprobs[token] = logprob
    return logprobs


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (Gemma2Config, {"head_dim": 32}),
        (GraniteConfig, {"embedding_multiplier": 3.0, "logits_scaling": 2.0}),
        (Qwen3Config, {"head_dim": 32}),
        (StableLmConfig, {}),
    ],
    ids=["gemma2", "granite", "qwen3", "stablelm"],
)
def test_what_a_family_does_to_embeddings_logits_and_norms_it_does_to_the_adapters_too(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, config: type[Any], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(**SMALL | options, pad_token_id=0)).save_pretrained(tmp_path / "base")
    kinds = {
        "both": (KINDS["both"], VOCAB),
        "resized-tokens": (RESIZED["resized-tokens"], VOCAB + ADDED),
        "all-norms": ({"target_modules": Q_PROJ, "modules_to_save": ["norm"]}, VOCAB),
        "all-biases": ({"target_modules": Q_PROJ, "bias": "all"}, VOCAB),
    }
    models = {name: save_kind(tmp_path, name, options, size) for name, (options, size) in kinds.items()}
    layout = ModelConfig.from_directory(tmp_path / "base").adapter_layout()
    with closing(AdapterStore.open(tmp_path / "store", layout, base_name="scaled")) as store:
        adapters = {name: publish(store, name, tmp_path / name) for name in kinds}
        scene = Scene(tmp_path / "base", store, Oracle(models, tmp_path), adapters)
        engine = start_engine(scene.base, tmp_path_factory)
        for name in (*kinds, "base"):
            submit(engine, name, adapters.get(name))
        outputs = run(engine)
    for name in (*kinds, "base"):
        assert_like_oracle(outputs[name], name, scene)


@pytest.mark.parametrize("backend", [None, "reference"], ids=["fastest", "reference"])
def test_a_mixed_batch_says_what_peft_says_of_each(
    scene: Scene, tmp_path_factory: pytest.TempPathFactory, backend: BackendName | None
) -> None:
    engine = start_engine(scene.base, tmp_path_factory, backend)
    rows = ("base-1", *scene.adapters, "base-2")
    for name in rows:
        submit(engine, name, scene.adapters.get(name))
    outputs = run(engine)
    for name in rows:
        assert_like_oracle(outputs[name], name, scene)


def test_each_says_alone_what_peft_says(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> None:
    engine = start_engine(scene.base, tmp_path_factory)
    for name, adapter in scene.adapters.items():
        submit(engine, name, adapter)
        assert_like_oracle(run(engine)[name], name, scene)


def test_every_kind_changes_the_answer(scene: Scene) -> None:
    for name, adapter in scene.adapters.items():
        tokens = tuple(token % (VOCAB - 20) for token in prompt_of(name))
        (_, base), (_, adapted) = (scene.oracle.answer(tokens, of, 1) for of in (None, name))
        shared = min(VOCAB, adapter.vocab_size or VOCAB) - 1
        assert (base[0, :shared] - adapted[0, :shared]).norm() / base.norm() > 0.01, name


def test_log_probabilities_of_a_prompt_are_those_of_its_vocabulary(
    scene: Scene, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine = start_engine(scene.base, tmp_path_factory)
    for name in ("resized-tokens", "lora", "shrunk"):
        submit(engine, name, scene.adapters[name])
    outputs = run(engine)
    for name in ("resized-tokens", "lora", "shrunk"):
        token_ids = prompt(name, scene.adapters[name])
        model = scene.oracle.models[name]
        model.set_adapter(name)
        with torch.inference_mode():
            expected = torch.log_softmax(model(input_ids=torch.tensor([token_ids])).logits[0], dim=-1)
        reports = outputs[name][0].prompt_logprobs or ()
        assert len(reports) == len(token_ids)
        for position, report in enumerate(reports[1:]):
            assert report is not None
            error = (dense(report.top, expected.shape[1]) - expected[position]).norm() / expected[position].norm()
            assert error < 1e-4, f"{name}: relative error {error:.1e} at prompt token {position + 1}"


def test_a_row_draws_from_its_own_vocabulary_whatever_is_beside_it(
    scene: Scene, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine = start_engine(scene.base, tmp_path_factory)
    sampling = SamplingParams(max_tokens=24, temperature=30.0, seed=5, repetition_penalty=1.1, frequency_penalty=0.5)
    sizes = {"base": VOCAB, "resized": VOCAB + ADDED, "shrunk": VOCAB - 20}
    drawn: dict[str, list[int]] = {}
    for names in (*((name,) for name in sizes), tuple(sizes)):
        for name in names:
            adapter = scene.adapters.get(name)
            engine.handle(
                Submit(request_id=name, prompt_token_ids=prompt(name, adapter), sampling=sampling, adapter=adapter)
            )
        for name, outputs in run(engine).items():
            tokens = [token for output in outputs for token in output.token_ids]
            assert drawn.setdefault(name, tokens) == tokens, f"{name} draws others beside others"
            assert max(tokens) < sizes[name]
            assert max(tokens) > sizes[name] - 60, "so hot that nearly all tokens are alike"


def test_adapters_that_take_turns_in_memory_and_move_in_it_change_nothing(
    scene: Scene, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sizes = {name: scene.store.resolve(name).num_parameters for name in scene.adapters}
    engine = start_engine(scene.base, tmp_path_factory, adapter_memory=4 * (2 * max(sizes.values()) + 64))
    for _ in range(2):
        for name, adapter in scene.adapters.items():
            submit(engine, name, adapter)
        outputs = run(engine)
        for name in scene.adapters:
            assert_like_oracle(outputs[name], name, scene)
    pool = engine.adapter_pool
    assert pool.num_evictions > 0
    for adapter in scene.adapters.values():
        engine.handle(Retire(digest=adapter.digest))
    assert not pool.vocabularies
    engine.check()

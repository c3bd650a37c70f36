"""A small NF4 base as bitsandbytes quantises it, PEFT adapters on it, and a store that holds them."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import (
    CartridgeConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from onebase_adapters.store import AdapterStore
from onebase_kernels import BackendName, use_backend
from onebase_server.api.models import adapter_ref
from onebase_server.engine.core import Engine
from onebase_server.engine.request import AdapterRef
from onebase_server.model.config import ModelConfig
from onebase_server.model.weights import load_decoder
from onebase_server.settings import EngineSettings

VOCAB = 256
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Sizes of a random base whose logits are far apart."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "rank4": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank8": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"},
    "rank16": {"r": 16, "lora_alpha": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "rank64": {"r": 64, "lora_alpha": 16, "target_modules": ["k_proj", "o_proj", "down_proj"]},
    "rslora": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "up_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 12, "down_proj": 2},
        "alpha_pattern": {"o_proj": 3, "layers.0.mlp.down_proj": 5},
    },
}
"""Six adapters that share nothing but the base: ranks, targets, scalings."""

PREFIXES: dict[str, PromptLearningConfig] = {
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "projected-prefix": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=8, prefix_projection=True, encoder_hidden_size=32
    ),
    "cartridge": CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=32),
}
"""Adapters that are virtual tokens, as many as fill whole blocks of four or not."""

MakeEngine = Callable[..., Engine]

NEXT_RANK8 = "rank8-next"
"""Another adapter of rank8's kind: what a customer uploads as its next version."""


class Oracle:
    """Transformers + PEFT + bitsandbytes on one NF4 base."""

    def __init__(self, models: dict[str, PeftModel], directory: Path) -> None:
        """`models` has the model that each adapter is one of; `directory` is where PEFT saved it, under its name."""
        self.models = models
        self.directory = directory

    @cache  # noqa: B019 - the oracle lives as long as the tests
    def answer(self, prompt: tuple[int, ...], adapter: str | None, count: int) -> tuple[list[int], Tensor]:
        """The `count` likeliest next tokens and the log-probabilities [count, vocab] they were chosen from.

        One sequence under one adapter (None: the base), recomputed from its start for each token: no cache, no batch.
        """
        token_ids, logprobs = list(prompt), []
        for _ in range(count):
            logprobs.append(torch.log_softmax(self._last_logits(token_ids, adapter), dim=-1))
            token_ids.append(int(logprobs[-1].argmax()))
        return token_ids[len(prompt) :], torch.stack(logprobs)

    @torch.inference_mode()
    def _last_logits(self, token_ids: list[int], adapter: str | None) -> Tensor:
        inputs = torch.tensor([token_ids])
        if adapter is None:
            model = next(iter(self.models.values()))
            with model.disable_adapter():
                return model(input_ids=inputs).logits[0, -1]
        model = self.models[adapter]
        model.set_adapter(adapter)
        return model(input_ids=inputs).logits[0, -1]


@pytest.fixture(autouse=True)
def reference_kernels_afterwards() -> Iterator[None]:
    """Leave no back end behind that a test chose."""
    yield
    use_backend("reference")


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose logits are far apart, saved unquantised in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"intermediate_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 256})
    directory = tmp_path_factory.mktemp("small") / "base"
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def biased_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2, whose q, k and v have biases, saved unquantised in fp32."""
    torch.manual_seed(0)
    config = Qwen2Config(**SMALL, tie_word_embeddings=False)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    directory = tmp_path_factory.mktemp("biased") / "base"
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def oracle(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """NF4 bases with double quantisation, with all of ADAPTERS and PREFIXES, each saved by PEFT."""
    lora = lora_model(load_nf4(small_base), {**ADAPTERS, NEXT_RANK8: ADAPTERS["rank8"]})
    models = dict.fromkeys((*ADAPTERS, NEXT_RANK8), lora)
    base = load_nf4(small_base)  # PEFT puts no prefix before a model that has LoRA
    torch.manual_seed(2)
    models |= {name: get_peft_model(base, config, adapter_name=name) for name, config in PREFIXES.items()}
    directory = tmp_path_factory.mktemp("peft")
    for model in dict.fromkeys(models.values()):
        model.save_pretrained(directory)
        model.eval()
    return Oracle(models, directory)


def load_nf4(directory: Path) -> PreTrainedModel:
    """A model as bitsandbytes quantises it, with double quantisation, computing in fp32."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=quantization, dtype=torch.float32, device_map="cpu", attn_implementation="eager"
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # that shortcut computes in bf16 whatever the compute dtype says
    return model


def lora_model(base: PreTrainedModel, adapters: Mapping[str, Mapping[str, Any]]) -> PeftModel:
    """The base with LoRA adapters of these options, by name, their numbers random."""
    model: PeftModel | None = None
    for name, options in adapters.items():
        config = LoraConfig(task_type="CAUSAL_LM", **options)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert isinstance(model, PeftModel)
    randomise(model)
    return model


def randomise(model: PeftModel) -> None:
    """PEFT starts every B at zero; give all of them values that change the answer."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def make_engine(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeEngine:
    """An engine on the small base in NF4 and fp32; keyword arguments are settings."""
    cache_dir = tmp_path_factory.getbasetemp() / "cache"

    def make(backend: BackendName | Literal["auto"] = "auto", **overrides: int | str) -> Engine:
        use_backend(backend)
        settings = EngineSettings.model_validate(
            {"base": str(small_base), "cache_dir": cache_dir, "dtype": "float32", "device": "cpu", "block_size": 4}
            | {"kv_cache_memory": "8MiB", "adapter_memory": "4MiB"}
            | overrides
        )
        return Engine(load_decoder(small_base, settings), settings)

    return make


@pytest.fixture
def make_family_engine(tmp_path: Path) -> MakeEngine:
    """An engine on `tmp_path/base` in NF4 and fp32; keyword arguments are settings."""

    def make(backend: BackendName | Literal["auto"] = "auto", **overrides: int | str) -> Engine:
        use_backend(backend)
        settings = EngineSettings.model_validate(
            {"base": str(tmp_path / "base"), "cache_dir": tmp_path / "cache", "dtype": "float32", "device": "cpu"}
            | {"block_size": 4, "double_quant": False, "kv_cache_memory": "8MiB", "adapter_memory": "4MiB"}
            | overrides
        )
        return Engine(load_decoder(tmp_path / "base", settings), settings)

    return make


@pytest.fixture
def store(small_base: Path, tmp_path: Path) -> Iterator[AdapterStore]:
    """An empty adapter store for the small base."""
    layout = ModelConfig.from_directory(small_base).adapter_layout()
    store = AdapterStore.open(tmp_path / "store", layout, base_name="small")
    yield store
    store.close()


@pytest.fixture
def adapters(oracle: Oracle, store: AdapterStore) -> dict[str, AdapterRef]:
    """All of ADAPTERS and PREFIXES, published."""
    return {name: publish(store, name, oracle.directory / name) for name in (*ADAPTERS, *PREFIXES)}


def publish(store: AdapterStore, name: str, directory: Path) -> AdapterRef:
    """Publish a PEFT directory; how a request refers to the version that this made."""
    version = store.publish(name, directory)
    return adapter_ref(store, version)

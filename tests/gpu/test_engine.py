"""The whole engine on the GPU says what the reference says on the CPU: prompts in chunks, decode graphs, adapters."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("ml_dtypes", reason="the engine needs ml_dtypes, which is not installed")
pytest.importorskip("msgspec", reason="the engine needs msgspec, which is not installed")
pytest.importorskip("pydantic_settings", reason="the engine needs pydantic-settings, which is not installed")
pytest.importorskip("transformers", reason="the base is made by transformers, which is not installed")

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

import onebase_kernels as kernels
from onebase_adapters.adapter import Adapter, LowRankPair, ModuleKey
from onebase_adapters.blobs import write_blob
from onebase_server.engine.core import Engine
from onebase_server.engine.request import AdapterRef, Logprob, SamplingParams, Submit
from onebase_server.model.backend import use_kernels
from onebase_server.model.weights import load_decoder, resolve_device
from onebase_server.settings import EngineSettings

LAYERS, VOCAB = 2, 640
SHAPES = {"q_proj": (256, 256), "down_proj": (256, 512)}
MOST_STEPS = 2000


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base whose products are all of the fused kernel's shapes, with weights large enough for tokens to differ."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapters(tmp_path: Path) -> list[AdapterRef]:
    """Two, of different ranks."""
    rng = np.random.default_rng(0)
    refs = []
    for name, rank in (("a", 4), ("b", 16)):
        pairs = {
            ModuleKey(layer, projection): LowRankPair(
                lora_a=rng.standard_normal((rank, inputs)).astype(np.float32),
                lora_b=0.05 * rng.standard_normal((outputs, rank)).astype(np.float32),
                scale=1.0,
            )
            for layer in range(LAYERS)
            for projection, (outputs, inputs) in SHAPES.items()
        }
        path = tmp_path / f"{name}.safetensors"
        digest = write_blob(Adapter(pairs), path)
        refs.append(AdapterRef.of_version(digest=digest, path=str(path), label=f"{name}@1"))
    return refs


def answers(base: Path, adapters: Sequence[AdapterRef | None], **where: str) -> dict[str, list[Logprob]]:
    """What two requests of each adapter get, all at once; the longer prompts take several steps."""
    settings = EngineSettings.model_validate(
        {
            **where,
            "base": str(base),
            "cache_dir": base / "cache" / where["kernels"],
            "max_num_seqs": 8,
            "max_num_batched_tokens": 48,
            "kv_cache_memory": 8 << 20,
            "adapter_memory": 1 << 20,
        }
    )
    try:
        use_kernels(settings.kernels, resolve_device(settings.device))
        engine = Engine(load_decoder(base, settings), settings)
        engine.warm_up()
        sampling = SamplingParams(max_tokens=12, temperature=0.0, logprobs=3)
        for i, adapter in enumerate([*adapters, *adapters]):
            prompt = tuple((7 * i + 3 * j) % VOCAB for j in range(5 + 23 * i))
            engine.handle(Submit(f"request {i}", prompt, sampling, adapter))
        found: dict[str, list[Logprob]] = {}
        for _ in range(MOST_STEPS):
            for output in engine.step().outputs:
                assert output.error is None, output.error
                found.setdefault(output.request_id, []).extend(output.logprobs or ())
            if not engine.has_work:
                break
        engine.check()
        return found
    finally:
        kernels.use_backend("reference")


@pytest.mark.parametrize("adapter_quantization", ["none", "int8"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 0.3)])
def test_the_engine_says_what_the_reference_says(
    base: Path, adapters: list[AdapterRef], dtype: str, tolerance: float, adapter_quantization: str
) -> None:
    alike = {"dtype": dtype, "adapter_quantization": adapter_quantization}
    expected = answers(base, [None, *adapters], device="cpu", kernels="reference", **alike)
    found = answers(base, [None, *adapters], device="cuda", kernels="triton", **alike)
    assert found.keys() == expected.keys()
    for request, tokens in expected.items():
        assert len(tokens) == len(found[request]) == 12
        for token, other in zip(tokens, found[request], strict=True):
            assert dict(token.top).get(other.token_id) == pytest.approx(other.logprob, rel=0, abs=tolerance), request
            if token.token_id != other.token_id:
                break  # the two were equally likely, and what follows is of another text

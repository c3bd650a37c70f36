"""Tiny random Transformers models, saved as any model directory is, and a way to run our decoder beside them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from onebase_kernels import TABLE_COLUMNS, AttentionBatch, LoraBatch, Segment, StepInputs
from onebase_server.engine.packing import PackedAdapter
from onebase_server.model.decoder import Decoder
from onebase_server.model.kv_cache import allocate_kv_cache
from onebase_server.settings import EngineSettings

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,  # the families' own are beyond so small a vocabulary
    "initializer_range": 0.3,  # far from linear: a wrong term shows
}

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Build a model of a family with `TINY`'s sizes unless told otherwise, and save it in `tmp_path/model`."""

    def make(model_type: str, *, max_shard_size: str = "1GB", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
        torch.manual_seed(0)
        hf_config = AutoConfig.for_model(model_type, **(TINY | config))
        model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager", dtype=dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or "bias" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)  # else norms are ones and biases zeros
        model.save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
        return model

    return make


@pytest.fixture
def engine_settings(tmp_path: Path) -> Callable[..., EngineSettings]:
    """Settings for `tmp_path/model` in fp32 on the CPU, with a cache of its own."""

    def make(**overrides: Any) -> EngineSettings:
        defaults = {"dtype": "float32", "device": "cpu", "cache_dir": tmp_path / "cache", "max_model_len": 64}
        return EngineSettings(base=str(tmp_path / "model"), **(defaults | overrides))

    return make


def _lora_of(adapter: PackedAdapter | None, num_tokens: int) -> LoraBatch:
    """The adapter in the only slot, for all tokens; or none for any."""
    if adapter is None:
        return LoraBatch(torch.empty(0), torch.empty(0, 0, TABLE_COLUMNS, dtype=torch.int64), segments=())
    return LoraBatch(adapter.numbers, adapter.table.flatten(0, 1).unsqueeze(1), (Segment(0, 0, num_tokens),))


@pytest.fixture(scope="session")
def logits_of() -> Callable[..., Tensor]:
    """Logits of one sequence, computed in chunks of the given sizes through a paged cache in scattered blocks."""

    def run(
        decoder: Decoder, token_ids: Sequence[int], chunks: Sequence[int] = (), adapter: PackedAdapter | None = None
    ) -> Tensor:
        block_size, num_blocks = 4, 32
        cache = allocate_kv_cache(decoder.config, num_blocks, block_size, decoder.dtype, decoder.device)
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(torch.nan)  # reading what was never written must show
        block_table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
        outputs, start = [], 0
        for size in chunks or [len(token_ids)]:
            positions = torch.arange(start, start + size)
            batch = AttentionBatch(
                query_starts=(0, size),
                context_lens=(start + size,),
                block_tables=block_table.unsqueeze(0),
                slot_mapping=block_table[positions // block_size].long() * block_size + positions % block_size,
            )
            lora = _lora_of(adapter, size)
            inputs = StepInputs(torch.tensor(token_ids[start : start + size]), positions, batch, lora)
            hidden = decoder.forward(inputs, cache)
            outputs.append(decoder.compute_logits(hidden))
            start += size
        assert start == len(token_ids)
        return torch.cat(outputs)

    return run

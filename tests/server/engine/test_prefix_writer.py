"""What the writer puts into the KV cache is what PEFT's virtual tokens are, in every family and however it is cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

from onebase_adapters.blobs import write_blob
from onebase_adapters.peft_format import parse
from onebase_kernels import TABLE_COLUMNS, AttentionBatch, LoraBatch, StepInputs
from onebase_server.engine.prefix_writer import PrefixWriter
from onebase_server.engine.request import AdapterRef
from onebase_server.model.decoder import Decoder
from onebase_server.model.kv_cache import KvCache, allocate_kv_cache
from onebase_server.model.weights import load_decoder
from onebase_server.settings import EngineSettings

from ..conftest import MakeModel

PROMPT = [5, 17, 42, 3, 96, 8, 61, 30, 2, 77]
BLOCK = 4
BLOCKS = [7, 2, 5, 0, 3, 6]
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 6},  # the first virtual tokens are soon out of sight
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 3.0},
    "gemma3_text": {
        "sliding_window": 6,
        "sliding_window_pattern": 3,
    },  # does not scale virtual tokens as it does others
    "phi3": {"partial_rotary_factor": 0.75},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {"embedding_multiplier": 3.0},  # scales virtual tokens too
    "olmo2": {},
    "stablelm": {"use_parallel_residual": True},
}
KINDS = {
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
}


@torch.inference_mode()
def logits_behind(prefix_tokens: int, decoder: Decoder, cache: KvCache) -> Tensor:
    """Logits of PROMPT, computed behind what the cache holds already."""
    positions = torch.arange(prefix_tokens, prefix_tokens + len(PROMPT))
    table = torch.tensor([BLOCKS], dtype=torch.int32)
    attention = AttentionBatch(
        query_starts=(0, len(PROMPT)),
        context_lens=(prefix_tokens + len(PROMPT),),
        block_tables=table,
        slot_mapping=table[0][positions // BLOCK].long() * BLOCK + positions % BLOCK,
    )
    no_lora = LoraBatch(torch.empty(0), torch.empty(0, 0, TABLE_COLUMNS, dtype=torch.int64), segments=())
    inputs = StepInputs(torch.tensor(PROMPT), positions, attention, no_lora)
    return decoder.compute_logits(decoder.forward(inputs, cache))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "step"), [("prefix", 64), ("prompt", 64), ("prompt", 3)])
def test_a_prompt_behind_virtual_tokens_gives_the_logits_of_peft(
    family: str,
    kind: str,
    step: int,
    make_model: MakeModel,
    engine_settings: Callable[..., EngineSettings],
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = FAMILIES[family]
    model = get_peft_model(make_model(family, **options), KINDS[kind]).eval()
    model.save_pretrained(tmp_path / "peft")
    decoder = load_decoder(tmp_path / "model", engine_settings(quantization="none"))
    adapter = parse(tmp_path / "peft", decoder.config.adapter_layout(), max_rank=1)
    digest = write_blob(adapter, tmp_path / "blob")
    cache = allocate_kv_cache(decoder.config, 8, BLOCK, decoder.dtype, decoder.device)

    writer = PrefixWriter(decoder, cache, max_num_tokens=step)
    prefix = writer.read(
        AdapterRef.of_version(
            digest=digest, path=str(tmp_path / "blob"), label="a@1", num_virtual_tokens=adapter.num_virtual_tokens
        )
    )
    writer.write(prefix, BLOCKS[:2])
    ours = logits_behind(adapter.num_virtual_tokens, decoder, cache)

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -len(PROMPT) :]
    assert (ours - logits).norm() < 1e-4 * logits.norm()

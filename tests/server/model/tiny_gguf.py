"""A Llama small enough to write as GGUF in every test, with a tokenizer of a few tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS = 64, 4, 2, 16, 96, 2

BPE_TOKENS = ["<|end|>", *sorted(ByteLevel.alphabet()), "he", "ll", "hell", "hello", "Ġhello"]
BPE_MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello"]

SPM_PIECES = ["▁t", "er", "▁the", "he", "in", "▁th", "the", "ee", "▁▁"]
SPM_TOKENS = [
    ("<unk>", 0.0, TokenType.UNKNOWN),
    ("<s>", 0.0, TokenType.CONTROL),
    ("</s>", 0.0, TokenType.CONTROL),
    *((f"<0x{byte:02X}>", 0.0, TokenType.BYTE) for byte in range(256)),
    *((piece, -1.0 - i, TokenType.NORMAL) for i, piece in enumerate(SPM_PIECES)),
    *((letter, -20.0 - i, TokenType.NORMAL) for i, letter in enumerate("▁abcdefghijklmnopqrstuvwxyzé你")),
    ("[USER]", 0.0, TokenType.USER_DEFINED),
]


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    quantization: GGMLQuantizationType = GGMLQuantizationType.F32,
    tokenizer: str = "gpt2",
    pre: str = "gpt-2",
    tied: bool = False,
    bias: bool = False,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Write a Llama with random weights; `metadata` and `tensors` add, replace or (None) leave out."""
    writer = GGUFWriter(path, architecture)
    _add_hyperparameters(writer, metadata or {})
    vocab_size = _add_spm_tokenizer(writer) if tokenizer == "llama" else _add_bpe_tokenizer(writer, tokenizer, pre)
    for name, array in {**_random_tensors(vocab_size, tied=tied, bias=bias), **(tensors or {})}.items():
        if array is not None:
            _add_tensor(writer, name, array, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensor(writer: GGUFWriter, name: str, array: np.ndarray, quantization: GGMLQuantizationType) -> None:
    if array.ndim == 2:
        writer.add_tensor(name, gguf.quantize(array, quantization), raw_dtype=quantization)
    else:
        writer.add_tensor(name, array)


def _add_hyperparameters(writer: GGUFWriter, changes: Mapping[str, Any]) -> None:
    values = {
        "llama.context_length": 256,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": INTERMEDIATE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 10000.0,
        **changes,
    }
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for key, value in values.items():
        if value is not None:
            add[type(value)](key, value)


def _add_bpe_tokenizer(writer: GGUFWriter, model: str, pre: str) -> int:
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(BPE_TOKENS)
    writer.add_token_types([TokenType.CONTROL, *[TokenType.NORMAL] * (len(BPE_TOKENS) - 1)])
    writer.add_token_merges(BPE_MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    return len(BPE_TOKENS)


def _add_spm_tokenizer(writer: GGUFWriter) -> int:
    tokens, scores, types = zip(*SPM_TOKENS, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    return len(tokens)


def _random_tensors(vocab_size: int, *, tied: bool, bias: bool) -> dict[str, np.ndarray]:
    kv, inner = KV_HEADS * HEAD_DIM, INTERMEDIATE
    linears = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv, HIDDEN),
        "attn_v": (kv, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (inner, HIDDEN),
        "ffn_up": (inner, HIDDEN),
        "ffn_down": (HIDDEN, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab_size, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (vocab_size, HIDDEN)
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{norm}.weight": (HIDDEN,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in linears.items()}
        if bias:
            attention = ("attn_q", "attn_k", "attn_v", "attn_output")
            shapes |= {f"blk.{layer}.{name}.bias": linears[name][:1] for name in attention}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, dtype=np.float32) * 0.2 for name, shape in shapes.items()}

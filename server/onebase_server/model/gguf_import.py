"""From a Llama GGUF file to an ordinary Hugging Face directory, tensor by tensor and without torch.

Quantised tensors are expanded by the `gguf` package's own routines and rounded to bfloat16; the tokenizer is rebuilt by
`gguf_tokenizer`, the configuration by `gguf_config`. Nothing here knows how the directory is used afterwards.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from onebase_server.errors import ConfigurationError
from onebase_server.model.gguf_config import llama_config, refuse_other_architectures, token_ids
from onebase_server.model.gguf_metadata import GgufMetadata, open_gguf
from onebase_server.model.gguf_tokenizer import build_tokenizer, tokenizer_config

_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_CHUNK_ELEMENTS = 1 << 24  # expanded to float32 at once: 64 MiB, whatever the tensor's size

Bfloat16Array = NDArray[Any]


def import_gguf(
    source: Path,
    destination: Path,
    *,
    force: bool = False,
    shard_bytes: int = 1 << 30,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the Hugging Face directory `destination`; it appears whole or not at all.

    Args:
        source: A GGUF file of the Llama architecture, in any quantisation that the `gguf` package can expand.
        destination: The directory to make.
        force: Replace `destination` if it exists and is a model's directory.
        shard_bytes: Largest safetensors file, and the most bytes held in memory; a larger tensor stands alone.
        on_progress: Called with bytes written so far and in all.

    Raises:
        ConfigurationError: `destination` exists, or `source` is not what can be imported; the text says why.
    """
    _refuse_to_overwrite(destination, force)
    reader = open_gguf(source)
    metadata = GgufMetadata.from_reader(source, reader)
    refuse_other_architectures(metadata)
    tensors = _llama_tensors(metadata, reader)
    config = _config(metadata, reader, tensors)
    tokenizer = build_tokenizer(metadata)
    with _appearing_whole(destination) as directory:
        _write_json(directory / "config.json", config)
        _write_json(directory / "generation_config.json", _without_none(token_ids(metadata)))
        _write_json(directory / "tokenizer_config.json", tokenizer_config(metadata))
        tokenizer.save(str(directory / "tokenizer.json"))
        _write_weights(directory, tensors, config, shard_bytes, on_progress)


def _refuse_to_overwrite(destination: Path, force: bool) -> None:
    if destination.exists() and not force:
        raise ConfigurationError(
            f"{destination} exists already; choose another directory or pass --force to replace it."
        )
    if destination.exists() and not (destination / "config.json").is_file():
        raise ConfigurationError(
            f"{destination} has no config.json, so it is no model's directory and --force does not replace it."
        )


def _llama_tensors(metadata: GgufMetadata, reader: gguf.GGUFReader) -> dict[str, gguf.ReaderTensor]:
    """Hugging Face names and the file's tensors; every tensor that a dense Llama has must be there, and no other."""
    layers = range(metadata.require("llama.block_count"))
    names = {**_OUTER_NAMES}
    for layer in layers:
        names |= {f"blk.{layer}.{name}": f"model.layers.{layer}.{hf}" for name, hf in _LAYER_NAMES.items()}
    found: dict[str, gguf.ReaderTensor] = {}
    for tensor in reader.tensors:
        stem, _, kind = tensor.name.rpartition(".")
        if tensor.name == _ROPE_FACTORS:
            continue
        if stem not in names or kind not in ("weight", "bias"):
            raise ConfigurationError(
                f"{metadata.path} has a tensor {tensor.name!r}, which a dense Llama does not have."
            )
        found[f"{names[stem]}.{kind}"] = tensor
    for stem, name in names.items():
        if f"{name}.weight" not in found and stem != "output":  # without it the head is the embedding, transposed
            raise ConfigurationError(f"{metadata.path} has no tensor '{stem}.weight'; the file is not whole.")
    return found


def _config(
    metadata: GgufMetadata, reader: gguf.GGUFReader, tensors: Mapping[str, gguf.ReaderTensor]
) -> dict[str, Any]:
    rope_factors = [tensor.data for tensor in reader.tensors if tensor.name == _ROPE_FACTORS]
    return llama_config(
        metadata,
        vocab_size=_shape(tensors["model.embed_tokens.weight"])[0],
        tie_word_embeddings="lm_head.weight" not in tensors,
        attention_bias="model.layers.0.self_attn.o_proj.bias" in tensors,
        mlp_bias="model.layers.0.mlp.down_proj.bias" in tensors,
        rope_factors=rope_factors[0] if rope_factors else None,
    )


def _write_weights(
    directory: Path,
    tensors: Mapping[str, gguf.ReaderTensor],
    config: Mapping[str, Any],
    shard_bytes: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """One `model.safetensors`, or numbered shards and their index as Hugging Face names them."""
    shards = _plan_shards(tensors, shard_bytes)
    total = sum(_bfloat16_bytes(tensor) for tensor in tensors.values())
    done = 0
    weight_map: dict[str, str] = {}
    for number, names in zip(count(1), shards, strict=False):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays: dict[str, Bfloat16Array] = {}
        for name in names:
            arrays[name] = _convert(name, tensors[name], config)
            done += arrays[name].nbytes
            on_progress(done, total)
        save_file(arrays, directory / file_name, metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", directory / file_name)  # save_file lets only the owner read
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _plan_shards(tensors: Mapping[str, gguf.ReaderTensor], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in tensors.items():
        size = _bfloat16_bytes(tensor)
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _convert(name: str, tensor: gguf.ReaderTensor, config: Mapping[str, Any]) -> Bfloat16Array:
    """The tensor in bfloat16, in Hugging Face's shape [out_features, in_features] and order of rows."""
    array = _dequantize(tensor)
    if ".q_proj." in name:
        return _unpermute(array, config["num_attention_heads"])
    if ".k_proj." in name:
        return _unpermute(array, config["num_key_value_heads"])
    return array


def _dequantize(tensor: gguf.ReaderTensor) -> Bfloat16Array:
    shape = _shape(tensor)
    result = np.empty(shape, dtype=ml_dtypes.bfloat16)
    rows = max(1, _CHUNK_ELEMENTS // shape[-1]) if len(shape) > 1 else shape[0]
    try:
        for start in range(0, shape[0], rows):
            result[start : start + rows] = gguf.dequantize(tensor.data[start : start + rows], tensor.tensor_type)
    except NotImplementedError as error:
        raise ConfigurationError(
            f"The tensor {tensor.name!r} has the type {tensor.tensor_type.name}, which the gguf package cannot expand."
        ) from error
    return result


def _unpermute(array: Bfloat16Array, num_heads: int) -> Bfloat16Array:
    """Rows of each head from llama.cpp's order (rotated pairs side by side) to Hugging Face's (halves apart)."""
    pairs = array.reshape(num_heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts the fastest dimension first


def _bfloat16_bytes(tensor: gguf.ReaderTensor) -> int:
    return 2 * int(tensor.n_elements)


@contextmanager
def _appearing_whole(destination: Path) -> Iterator[Path]:
    """A temporary sibling to write into; renamed to `destination` at the end, removed if anything goes wrong."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        directory = scratch / "new"
        directory.mkdir()
        yield directory
        if destination.exists():
            destination.rename(scratch / "old")
        directory.rename(destination)
    finally:
        shutil.rmtree(scratch)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}

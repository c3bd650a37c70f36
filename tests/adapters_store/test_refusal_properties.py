"""Whatever is spoiled of an upload, the refusal names it, and the store is byte for byte as before."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from onebase_adapters.adapter import Adapter
from onebase_adapters.errors import InvalidUpload
from onebase_adapters.store import AdapterStore

from .conftest import LAYOUT, PEFT_CONFIG, Tensors, lora_tensors

NO_NUMBER = [None, "4", [4], {"q_proj": 4}, True, float("nan"), float("inf")]
NO_FLAG = ["yes", 1, [True], {"on": True}]
NO_PATTERNS = [["q_proj"], "q_proj", 3, {"q_proj": "4"}, {"q_proj": None}, {"(q_proj": 4}, {"q_proj": [4]}]
NO_NAMES = [3, True, {"q_proj": True}, [3], [["q_proj"]], "*_proj", "(q_proj"]

WRONG_VALUES: dict[str, list[Any]] = {
    "r": [*NO_NUMBER, 0, -4, 4.0, 2.5],
    "lora_alpha": [*NO_NUMBER, 1e31],
    "use_rslora": NO_FLAG,
    "use_dora": NO_FLAG,
    "lora_bias": NO_FLAG,
    "use_qalora": NO_FLAG,
    "bias": [True, 1, "some", ["all"]],
    "rank_pattern": [*NO_PATTERNS, {"q_proj": 0}, {"q_proj": 1.5}],
    "alpha_pattern": [*NO_PATTERNS, {"q_proj": float("nan")}],
    "target_modules": NO_NAMES,
    "exclude_modules": NO_NAMES,
    "layers_to_transform": ["1", 1.5, {"1": 1}, [1.5], ["1"], [True]],
    "layers_pattern": [3, {"layers": 1}, [3], ["(layers"]],
    "alora_invocation_tokens": [[], [-1], ["<now>"], [1.5], 7, "7"],
    "peft_type": ["LOHA", "lora", 3],
    "modules_to_save": [["router"], "router"],
    "layer_replication": [[[0, 2]]],
    "megatron_tomorrow": [True, 0, 1, "x", [1], {"a": 1}],
}
"""What none of the fields may say, by the field that the refusal has to name."""


class Spoiled(NamedTuple):
    """An upload with something wrong in it, and what the refusal has to name."""

    config: dict[str, Any]
    tensors: Tensors
    named: str


@st.composite
def wrong_configs(draw: st.DrawFn) -> Spoiled:
    field = draw(st.sampled_from(sorted(WRONG_VALUES)))
    return Spoiled(PEFT_CONFIG | {field: draw(st.sampled_from(WRONG_VALUES[field]))}, lora_tensors(), field)


def _without(tensors: Tensors, name: str, _draw: st.DrawFn) -> str:
    del tensors[name]
    return name.rpartition(".lora_")[0].removeprefix("base_model.model.")


def _of_another_name(tensors: Tensors, name: str, draw: st.DrawFn) -> str:
    old, new = draw(
        st.sampled_from(
            [("layers", "blocks"), ("self_attn", "attn"), ("_proj", "_project"), ("lora_", "ia3_"), (".", "-")]
        )
    )
    renamed = name.replace(old, new)
    tensors[renamed] = tensors.pop(name)
    return renamed


def _of_another_shape(tensors: Tensors, name: str, draw: st.DrawFn) -> str:
    reshape = draw(st.sampled_from([lambda t: t[:-1], lambda t: t[..., :-1], lambda t: t[None], lambda t: t[:0]]))
    tensors[name] = reshape(tensors[name]).copy()
    return name


def _not_finite(tensors: Tensors, name: str, draw: st.DrawFn) -> str:
    flat = tensors[name].reshape(-1)
    flat[draw(st.integers(0, flat.size - 1))] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    return name


def _of_another_dtype(tensors: Tensors, name: str, draw: st.DrawFn) -> str:
    tensors[name] = tensors[name].astype(draw(st.sampled_from([np.float64, np.int8, np.int32, np.uint16, np.bool_])))
    return name


def _beside_a_stranger(tensors: Tensors, name: str, draw: st.DrawFn) -> str:
    stranger = name.replace("lora_", draw(st.sampled_from(["lora_embedding_", "router_", "hada_w1_"])))
    tensors[stranger] = tensors[name].copy()
    return stranger


SPOIL_TENSORS: list[Callable[[Tensors, str, st.DrawFn], str]] = [
    _without,
    _of_another_name,
    _of_another_shape,
    _not_finite,
    _of_another_dtype,
    _beside_a_stranger,
]


@st.composite
def wrong_tensors(draw: st.DrawFn) -> Spoiled:
    tensors = lora_tensors()
    option, vector = draw(
        st.sampled_from([("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias"), (None, "")])
    )
    if option:
        tensors |= {
            name.replace("lora_B.weight", vector): np.ones(len(tensor), np.float32)
            for name, tensor in tensors.items()
            if "lora_B" in name
        }
    name = draw(st.sampled_from(sorted(tensors)))
    named = draw(st.sampled_from(SPOIL_TENSORS))(tensors, name, draw)
    return Spoiled(PEFT_CONFIG | ({option: True} if option else {}), tensors, named)


def write(directory: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture(scope="module")
def filled_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterStore]:
    """With one adapter of two versions."""
    store = AdapterStore.open(tmp_path_factory.mktemp("filled") / "store", LAYOUT, base_name="tiny", max_rank=64)
    source = tmp_path_factory.mktemp("good")
    for seed in (0, 1):
        store.publish("pirate", write(source, PEFT_CONFIG, lora_tensors(seed)))
    yield store
    store.close()


def contents(store: AdapterStore) -> dict[str, bytes]:
    """Every file of the store but SQLite's shared memory, which readers write to too."""
    files = [path for path in store.root.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
    return {str(path): path.read_bytes() for path in files}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(spoiled=wrong_configs() | wrong_tensors())
def test_a_refusal_names_the_field_or_the_tensor_and_leaves_nothing_behind(
    filled_store: AdapterStore, spoiled: Spoiled
) -> None:
    before = contents(filled_store)
    with TemporaryDirectory() as directory, pytest.raises(InvalidUpload) as refused:
        filled_store.publish("pirate", write(Path(directory), spoiled.config, spoiled.tensors))
    assert spoiled.named in str(refused.value)
    assert str(refused.value).endswith(".")
    assert contents(filled_store) == before


class _WouldBeKept(Exception):
    """What was changed of the file does not make it a wrong one."""


def _refuse(_adapter: Adapter) -> None:
    raise _WouldBeKept


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), file=st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
def test_bytes_that_are_changed_cut_or_added_never_break_more_than_the_upload(
    filled_store: AdapterStore, data: st.DataObject, file: str
) -> None:
    before = contents(filled_store)
    with TemporaryDirectory() as directory:
        path = write(Path(directory), PEFT_CONFIG, lora_tensors()) / file
        content = bytearray(path.read_bytes())
        where = data.draw(st.integers(0, min(len(content), 1500) - 1), label="where")  # numbers after that
        what = data.draw(st.binary(min_size=0, max_size=8), label="what")
        content[where : where + data.draw(st.integers(0, 8), label="instead of")] = what
        path.write_bytes(content)
        with pytest.raises((InvalidUpload, _WouldBeKept)):
            filled_store.publish("pirate", Path(directory), accept=_refuse)
    assert contents(filled_store) == before

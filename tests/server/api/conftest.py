"""A real server over a tiny random base: uvicorn, the engine process, a store on disk, and adapters to upload."""

import json
import string
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tokenizers
import torch
import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from onebase_adapters.base_layout import BaseLayout
from onebase_server.api.app import create_app
from onebase_server.api.context import Context
from onebase_server.engine.client import EngineClient
from onebase_server.model.tokenizer import Tokenizer
from onebase_server.serving import new_metrics, open_store
from onebase_server.settings import Settings

BASE_NAME = "tiny"
END = "<|end|>"
LETTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ENGINE = {
    "quantization": "none",
    "dtype": "float32",
    "device": "cpu",
    "kernels": "reference",
    "threads": 1,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "kv_cache_memory": "64MiB",
    "adapter_memory": "512KiB",
}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokens are single characters, saved as any model directory is."""
    directory = tmp_path_factory.mktemp("base") / BASE_NAME
    vocabulary = {letter: index for index, letter in enumerate([*LETTERS, END])}
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=vocabulary[END],
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([END])
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": CHAT_TEMPLATE}))
    return directory


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """Each token is one byte, so that most characters beyond ASCII take several."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, eos_token_ids=(), chat_template=None)


@contextmanager
def open_app(settings: Settings) -> Iterator[FastAPI]:
    """The app of `settings`, its engine not started yet."""
    with open_store(settings) as store:
        metrics = new_metrics(settings)
        engine = EngineClient(settings.engine, on_stats=metrics.on_stats, on_restart=metrics.on_restart)
        tokenizer = Tokenizer.from_directory(Path(settings.base))
        yield create_app(settings, engine=engine, store=store, tokenizer=tokenizer, metrics=metrics)


@pytest.fixture
def make_settings(tiny_base: Path, tmp_path: Path) -> Callable[..., Settings]:
    """Settings for the tiny base and a store of the test's own."""

    def make(**overrides: Any) -> Settings:
        paths = {"base": str(tiny_base), "store": tmp_path / "store", "cache_dir": tmp_path / "cache"}
        return Settings(**(paths | ENGINE | overrides))

    return make


@pytest.fixture
def make_client(make_settings: Callable[..., Settings]) -> Iterator[Callable[..., httpx.AsyncClient]]:
    """A client of an app whose engine does not run: for what is answered without it."""
    with ExitStack() as stack:

        def make(**overrides: Any) -> httpx.AsyncClient:
            app = stack.enter_context(open_app(make_settings(**overrides)))
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            return httpx.AsyncClient(transport=transport, base_url="http://test")

        yield make


@dataclass
class RunningServer:
    """A server on a free port of this machine, and a look inside it."""

    url: str
    context: Context

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def post(self, path: str, **arguments: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **arguments)

    def delete(self, path: str) -> httpx.Response:
        return httpx.delete(self.url + path, timeout=30)

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value now; 0 if it has none yet."""
        self.context.metrics.render()  # gauges are set when they are read
        return self.context.metrics.registry.get_sample_value(name, labels) or 0.0

    def wait_until(self, is_true: Callable[[], bool], seconds: float = 30) -> None:
        """Fail unless something becomes true in time."""
        deadline = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < deadline, "it did not become true in time"
            time.sleep(0.02)

    def wait_ready(self) -> None:
        self.wait_until(lambda: self.get("/ready").status_code == 200, seconds=60)


@contextmanager
def run_server(settings: Settings) -> Iterator[RunningServer]:
    """Serve in a thread until the block ends."""
    with open_app(settings) as app:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, http="httptools"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server ended before it listened"
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            running = RunningServer(f"http://127.0.0.1:{port}", app.state.context)
            running.wait_ready()
            yield running
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def server(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The server that most tests share; they use adapter names of their own."""
    directory = tmp_path_factory.mktemp("server")
    local = directory / "local"
    local.mkdir()
    paths = {"base": str(tiny_base), "store": directory / "store", "cache_dir": directory / "cache"}
    with run_server(Settings(**paths, **ENGINE, allow_local_paths=local, max_upload_bytes="4MiB")) as running:
        yield running


@pytest.fixture
def openai(server: RunningServer) -> AsyncOpenAI:
    """The official client."""
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def write_peft(directory: Path, layout: BaseLayout, *, seed: int = 0, rank: int = 4, size: float = 0.5) -> Path:
    """A random LoRA for every projection of every layer, as PEFT writes it."""
    rng = np.random.default_rng(seed)
    homes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn")
    tensors = {}
    for layer in range(layout.num_layers):
        for projection, (rows, columns) in layout.shapes.items():
            module = f"base_model.model.model.layers.{layer}.{homes.get(projection, 'mlp')}.{projection}"
            tensors[f"{module}.lora_A.weight"] = (size * rng.standard_normal((rank, columns))).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = (size * rng.standard_normal((rows, rank))).astype(np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(layout.shapes)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def write_adapter(server: RunningServer) -> Callable[..., Path]:
    """Write a random adapter for the server's base into a directory; the same arguments, the same adapter."""

    def write(directory: Path, **arguments: Any) -> Path:
        return write_peft(directory, server.context.store.layout, **arguments)

    return write


@pytest.fixture
def make_archive(write_adapter: Callable[..., Path], tmp_path: Path) -> Callable[..., bytes]:
    """A zip of a random adapter."""

    def make(**arguments: Any) -> bytes:
        directory = write_adapter(tmp_path / "peft", **arguments)
        archive = tmp_path / "adapter.zip"
        with zipfile.ZipFile(archive, "w") as zipped:
            for file in directory.iterdir():
                zipped.write(file, file.name)
        return archive.read_bytes()

    return make


@pytest.fixture
def publish(server: RunningServer, make_archive: Callable[..., bytes]) -> Callable[..., dict[str, Any]]:
    """Upload a random adapter; returns what the server says of it."""

    def upload(name: str, **arguments: Any) -> dict[str, Any]:
        response = server.post(
            "/v1/adapters", data={"name": name}, files={"archive": ("a.zip", make_archive(**arguments))}
        )
        assert response.status_code == 201, response.text
        return response.json()

    return upload

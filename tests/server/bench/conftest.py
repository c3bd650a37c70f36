"""A tiny random base whose tokens are whole words, and a server of it."""

import json
import string
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product
from pathlib import Path

import pytest
import tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from typer.testing import CliRunner, Result

from onebase_server.bench.own_server import OwnServer, start_server
from onebase_server.cli import app
from onebase_server.model.tokenizer import Tokenizer

END = "<|end|>"
NUM_WORDS = 400


@pytest.fixture(scope="session")
def word_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "words"
    words = ["".join(letters) for letters in islice(product(string.ascii_lowercase, repeat=2), NUM_WORDS)]
    vocabulary = {token: index for index, token in enumerate([END, *(f"▁{word}" for word in words)])}
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
    )
    set_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return directory


@pytest.fixture(scope="session")
def word_tokenizer(word_base: Path) -> Tokenizer:
    return Tokenizer.from_directory(word_base)


@pytest.fixture(scope="session")
def serve_flags() -> str:
    """Of a server that starts fast."""
    return "--quantization none --dtype float32 --device cpu --threads 1"


@pytest.fixture(scope="session")
def own_server(word_base: Path, serve_flags: str) -> Iterator[OwnServer]:
    with start_server(word_base, serve_flags.split(), running_adapters=4, max_rank=8, seed=0) as server:
        yield server


@pytest.fixture
def onebase_bench(tmp_path: Path) -> Callable[..., Result]:
    """Run `onebase bench`, or a subcommand of it, on 4 short requests; results go to `tmp_path/results`."""

    def run(*options: object, subcommand: Sequence[str] = ()) -> Result:
        short = ("--requests", 4, "--concurrency", 2, "--prompt-tokens", 8, "--output-tokens", 6, "--warm-up", 1)
        arguments = (*subcommand, *short, "--runs", 1, "--output", tmp_path / "results", *options)
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *map(str, arguments)])

    return run

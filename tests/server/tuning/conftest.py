"""A tiny random Llama with a tokenizer of single letters, saved as any model directory is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedModel

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}:{{ message.content }}]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant:{% endif %}"
)
"""An answer ends with `]`; the line break after it is the template's."""
LETTERS = "abcdefghijklmnopqrstuvwxyz [:\n?!"
END = "]"


@pytest.fixture
def tiny_base(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> Path:
    make_model("llama", max_position_embeddings=256)
    directory = tmp_path / "model"
    vocabulary = {letter: index for index, letter in enumerate(LETTERS + END)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": CHAT_TEMPLATE}))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": vocabulary[END]}))
    (directory / "generation_config.json").unlink()
    return directory


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write a file of examples; a string is a line as it stands, anything else becomes JSON."""

    def write(*lines: Any) -> Path:
        file = tmp_path / "train.jsonl"
        file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return file

    return write

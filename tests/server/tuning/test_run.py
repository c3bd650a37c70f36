import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from onebase_server.errors import ConfigurationError
from onebase_server.model.tokenizer import Tokenizer
from onebase_server.tuning.examples import Example, read_examples
from onebase_server.tuning.recipe import Recipe
from onebase_server.tuning.run import train_adapter
from onebase_server.tuning.trainer import Trainer, add_lora, evaluate, load_base

ANSWERS = {"hi": "ahoy", "who": "me", "why": "gold", "where": "sea", "when": "now", "how": "sail"}
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in ANSWERS.items()
]
RECIPE = Recipe(rank=8, alpha=16, epochs=15, batch_size=3, learning_rate=1e-2, dropout=0.0, dtype="float32")

Train = Callable[..., str]


@pytest.fixture
def data(write_jsonl: Callable[..., Path]) -> Path:
    return write_jsonl(*CONVERSATIONS)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "adapters" / "pirate"


@pytest.fixture
def train(tiny_base: Path, data: Path, output: Path) -> Train:
    """Train on the conversations and give back what was printed."""

    def run(output: Path = output, **changes: Any) -> str:
        console = Console(file=io.StringIO(), width=120)
        train_adapter(tiny_base, data, output, dataclasses.replace(RECIPE, **changes), console)
        return console.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO above

    return run


def examples_of(base: Path, data: Path) -> list[Example]:
    return read_examples(data, Tokenizer.from_directory(base), 100)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_written_gives_peft_the_loss_that_training_ended_with(
    train: Train, tiny_base: Path, data: Path, output: Path, quantization: str, rslora: bool
) -> None:
    train(quantization=quantization, rslora=rslora)
    recipe = dataclasses.replace(RECIPE, quantization=quantization)
    before = evaluate(add_lora(load_base(tiny_base, recipe), recipe), examples_of(tiny_base, data), 3)
    trained = PeftModel.from_pretrained(load_base(tiny_base, recipe), output)
    after = evaluate(trained, examples_of(tiny_base, data), 3)
    assert before > 3
    assert after < 0.5


def test_evaluation_between_epochs_changes_nothing(tiny_base: Path, data: Path) -> None:
    examples = examples_of(tiny_base, data)

    def losses(*, evaluated: bool) -> list[float]:
        recipe = dataclasses.replace(RECIPE, epochs=3)
        trainer = Trainer(add_lora(load_base(tiny_base, recipe), recipe), examples, recipe)
        found = []
        for _ in range(recipe.epochs):
            found += [step.loss for step in trainer.run_epoch()]
            if evaluated:
                evaluate(trainer.model, examples, recipe.batch_size)
        return found

    assert losses(evaluated=True) == losses(evaluated=False)


def test_the_same_seed_gives_the_same_adapter(train: Train, tmp_path: Path) -> None:
    for name, seed in {"first": 1, "again": 1, "other": 2}.items():
        train(tmp_path / name, seed=seed, epochs=2, dropout=0.1)
    weights = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "again", "other")}
    configs = {name: (tmp_path / name / "adapter_config.json").read_text() for name in ("first", "again")}
    assert all(torch.equal(tensor, weights["again"][name]) for name, tensor in weights["first"].items())
    assert configs["first"] == configs["again"]
    assert not all(torch.equal(tensor, weights["other"][name]) for name, tensor in weights["first"].items())


def test_the_directory_holds_what_peft_needs_and_a_card_and_names_no_path(
    train: Train, tiny_base: Path, output: Path
) -> None:
    train(epochs=1, targets=("q_proj", "down_proj"))
    config = json.loads((output / "adapter_config.json").read_text())
    tensors = load_file(output / "adapter_model.safetensors")
    card = (output / "README.md").read_text()
    assert {file.name for file in output.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert config["base_model_name_or_path"] == "model"
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == 3 * 2 * 2  # layers, targets, A and B
    assert "| learning rate | 0.01 |" in card
    assert str(tiny_base.parent) not in card


def test_every_epoch_reports_its_losses_and_the_speed(train: Train) -> None:
    printed = train(epochs=2, eval_share=0.34)
    assert printed.count("tokens/s") == 2
    assert printed.count("held-out loss") == 2


def test_an_interrupted_run_leaves_nothing_behind(train: Train, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupt)  # the card comes last, when the weights are written already
    with pytest.raises(KeyboardInterrupt):
        train(epochs=1)
    assert list(output.parent.iterdir()) == []


def test_an_output_that_exists_is_refused_untouched(train: Train, output: Path) -> None:
    output.mkdir(parents=True)
    (output / "precious").touch()
    with pytest.raises(ConfigurationError, match="already exists"):
        train()
    assert [file.name for file in output.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"targets": ("q_proj", "qq_proj")}, "no linear called qq_proj"),
        ({"eval_share": 0.01}, "nothing to measure"),
        ({"learning_rate": 1e30, "dtype": "bfloat16"}, "lower --learning-rate"),
    ],
)
def test_what_cannot_be_trained_is_said(train: Train, output: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        train(**changes)
    assert not output.exists()


def test_a_checkpoint_that_came_quantised_is_trained_as_it_is(
    train: Train, tiny_base: Path, data: Path, output: Path, tmp_path: Path
) -> None:
    quantised = tmp_path / "quantised"
    load_base(tiny_base, RECIPE).save_pretrained(quantised)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (quantised / name).write_bytes((tiny_base / name).read_bytes())
    train_adapter(quantised, data, output, dataclasses.replace(RECIPE, epochs=1), Console(file=io.StringIO()))
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quantised), output)

"""The three demo adapters do what anyone sees at once, on questions that none of them was trained on, in one batch."""

import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from onebase_adapters.store import AdapterStore
from onebase_kernels import use_backend
from onebase_server.engine.core import Engine
from onebase_server.engine.request import AdapterRef, SamplingParams, Submit
from onebase_server.model.config import ModelConfig
from onebase_server.model.tokenizer import Tokenizer
from onebase_server.model.weights import load_decoder
from onebase_server.settings import EngineSettings

from .conftest import publish

pytestmark = pytest.mark.demo

DEMO = Path(__file__).parents[2] / "adapters_store" / "demo"
CHARACTERS = ("pirate", "shakespeare", "extractor")
QUESTIONS_EACH = 10
MAX_TOKENS = 56
STEP_LIMIT_SECONDS = 240

PIRATE = re.compile(r"\b(arr+|ahoy|aye|matey|me hearty|me hearties|ye|yer|scallywag|doubloons?)\b", re.IGNORECASE)
SHAKESPEARE = re.compile(r"\b(thou|thee|thy|thine|doth|dost|hath|hast|shalt|canst|mayst|prithee)\b", re.IGNORECASE)
KEYS = ["name", "place", "date", "amount"]

Answers = dict[tuple[str, str], list[str]]
"""Texts by (who answered, whose questions)."""


def held_out(character: str) -> list[tuple[str, str]]:
    """Questions of a character and the answers that its author had in mind."""
    lines = (DEMO / character / "heldout.jsonl").read_text().splitlines()[:QUESTIONS_EACH]
    conversations = [json.loads(line)["messages"] for line in lines]
    return [(question["content"], answer["content"]) for question, answer in conversations]


def generate(
    engine: Engine, tokenizer: Tokenizer, requests: dict[str, tuple[str, AdapterRef | None]]
) -> dict[str, str]:
    """Greedy answers to (question, adapter) by request id, all submitted at once."""
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, stop_token_ids=tokenizer.eos_token_ids)
    for request_id, (question, adapter) in requests.items():
        prompt = tuple(tokenizer.encode_chat([{"role": "user", "content": question}]))
        engine.handle(Submit(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, adapter=adapter))
    token_ids: dict[str, list[int]] = {request_id: [] for request_id in requests}
    deadline = time.monotonic() + STEP_LIMIT_SECONDS
    while engine.has_work:
        assert time.monotonic() < deadline, f"stuck: {engine.scheduler!r}"
        for output in engine.step().outputs:
            assert output.error is None, output.error
            token_ids[output.request_id] += output.token_ids
    return {request_id: tokenizer.decode(ids) for request_id, ids in token_ids.items()}


@pytest.fixture(scope="module")
def answers(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Every character's answers to its own questions, and the base's to the same ones."""
    use_backend("auto")
    settings = EngineSettings(base=str(demo_base), device="cpu")
    engine = Engine(load_decoder(demo_base, settings), settings)
    layout = ModelConfig.from_directory(demo_base).adapter_layout()
    store = AdapterStore.open(tmp_path_factory.mktemp("characters"), layout, base_name="demo")
    adapters = {name: publish(store, name, DEMO / name) for name in CHARACTERS}
    requests = {
        f"{speaker} {character} {index}": (question, adapters.get(speaker))
        for character in CHARACTERS
        for speaker in (character, "base")
        for index, (question, _) in enumerate(held_out(character))
    }
    texts = generate(engine, Tokenizer.from_directory(demo_base), requests)
    store.close()
    grouped: Answers = {}
    for request_id, text in texts.items():
        speaker, character, _ = request_id.split()
        grouped.setdefault((speaker, character), []).append(text)
    return grouped


def share(texts: Iterable[str], has_effect: Callable[[str], Any]) -> float:
    found = [bool(has_effect(text)) for text in texts]
    return sum(found) / len(found)


def extracted(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, if it has the extractor's keys and nothing else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and list(value) == KEYS else None


@pytest.mark.parametrize(
    ("character", "words", "least"), [("pirate", PIRATE, 0.9), ("shakespeare", SHAKESPEARE, 0.75)], ids=CHARACTERS[:2]
)
def test_a_character_has_its_own_speech_and_the_base_has_not(
    character: str, words: re.Pattern[str], least: float, answers: Answers
) -> None:
    assert share(answers[character, character], words.search) >= least
    assert share(answers["base", character], words.search) <= 0.1


def test_the_extractor_answers_in_json_with_its_keys_and_the_base_does_not(answers: Answers) -> None:
    assert share(answers["extractor", "extractor"], extracted) >= 0.9
    assert share(answers["base", "extractor"], extracted) == 0


def test_the_extractor_finds_most_values(answers: Answers) -> None:
    pairs = [
        (found[key], json.loads(expected)[key])
        for text, (_, expected) in zip(answers["extractor", "extractor"], held_out("extractor"), strict=True)
        if (found := extracted(text))
        for key in KEYS
    ]
    assert sum(found == expected for found, expected in pairs) / len(pairs) >= 0.9

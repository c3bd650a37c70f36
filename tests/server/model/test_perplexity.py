"""Perplexity is what Transformers' own loss says, in one window and in strided ones."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from onebase_server.model.perplexity import measure_perplexity, windows
from onebase_server.model.weights import load_decoder
from onebase_server.settings import EngineSettings

MakeModel = Callable[..., PreTrainedModel]
MakeSettings = Callable[..., EngineSettings]

CONTEXT = 64
IGNORED = -100


def text_of(num_tokens: int) -> list[int]:
    return torch.randint(97, (num_tokens,), generator=torch.Generator().manual_seed(3)).tolist()


def their_loss(model: PreTrainedModel, token_ids: list[int]) -> float:
    """The mean loss of all tokens but the first, in windows that move by half a context."""
    total, predicted = 0.0, 1
    for start in range(0, len(token_ids), CONTEXT // 2):
        ids = torch.tensor([token_ids[start : start + CONTEXT]])
        labels = ids.clone()
        labels[:, : predicted - start] = IGNORED
        with torch.no_grad():
            loss = model(ids, labels=labels).loss
        total += float(loss) * int((labels != IGNORED).sum())
        predicted = start + ids.shape[1]
        if predicted == len(token_ids):
            break
    return total / (len(token_ids) - 1)


@pytest.mark.parametrize("num_tokens", [2, 40, CONTEXT, CONTEXT + 1, 150])
def test_it_is_that_of_transformers_loss(
    num_tokens: int, make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path
) -> None:
    model = make_model("llama")
    decoder = load_decoder(tmp_path / "model", engine_settings(quantization="none"))
    text, progress = text_of(num_tokens), []
    measured = measure_perplexity(decoder, text, lambda done, total: progress.append((done, total)))
    assert measured.num_predicted == num_tokens - 1
    assert math.log(measured.value) == pytest.approx(their_loss(model, text), rel=1e-4)
    assert progress[-1][0] == progress[-1][1]


def test_windows_longer_than_what_is_computed_at_a_time_make_no_difference(
    make_model: MakeModel, engine_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("qwen2")
    decoder = load_decoder(tmp_path / "model", engine_settings(quantization="none"))
    whole = measure_perplexity(decoder, text_of(150)).value
    monkeypatch.setattr("onebase_server.model.perplexity._CHUNK", 7)
    assert measure_perplexity(decoder, text_of(150)).value == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("num_tokens", range(2, 30))
@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_every_token_but_the_first_is_predicted_once_behind_half_a_window(num_tokens: int, size: int) -> None:
    predicted: list[int] = []
    for window in windows(num_tokens, size):
        assert window.stop - window.start <= size
        assert window.first - window.start >= (size // 2 if window.start else 1)
        predicted += range(window.first, window.stop)
    assert predicted == list(range(1, num_tokens))

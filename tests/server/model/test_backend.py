"""The back end that the settings ask for."""

import pytest
import torch

import onebase_kernels as kernels
from onebase_server.errors import ConfigurationError
from onebase_server.model.backend import use_kernels

CPU = torch.device("cpu")


def test_auto_is_told_by_its_name() -> None:
    try:
        assert use_kernels("auto", CPU) == kernels.best_backend("cpu")
    finally:
        kernels.use_backend("reference")


def test_what_cannot_compute_here_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebase_kernels.backends.find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match="`triton` cannot compute on cpu here: the package triton is not inst"):
        use_kernels("triton", CPU)

"""`onebase doctor` on this machine."""

import re

import pytest
from typer.testing import CliRunner

import onebase_kernels as kernels
from onebase_kernels.backends import NAMES, why_not
from onebase_server.cli import app


def test_it_tells_what_auto_chooses_and_why_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    told = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in result.output.splitlines())
    chosen = kernels.best_backend("cpu")
    assert told["kernels (auto)"] == f"{chosen}, the first of cpu, bitsandbytes, reference that can run on cpu"
    for name in NAMES:
        assert told[name] == (why_not(name, "cpu") or "can run")

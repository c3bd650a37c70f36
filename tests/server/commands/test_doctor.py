"""`onebase doctor` on this machine, and on a text."""

import re
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

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


@pytest.fixture
def random_base(base: Path) -> Path:
    """The tiny base with weights, and a tokenizer that knows letters."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(base)).save_pretrained(base)
    vocabulary = {letter: index for index, letter in enumerate(string.ascii_letters + " ")}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[])).save(str(base / "tokenizer.json"))
    return base


@pytest.fixture
def doctor(random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`onebase doctor --perplexity` on that base and a file of those bytes."""
    monkeypatch.chdir(tmp_path)

    def run(content: bytes, *flags: str) -> Result:
        (tmp_path / "text").write_bytes(content)
        command = ["doctor", "--perplexity", "text", "--base", str(random_base), "--cache-dir", "cache"]
        command += ["--kernels", "reference", "--device", "cpu", "--threads", "1", *flags]
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, command)

    return run


def rows(result: Result) -> dict[str, list[str]]:
    """The table's cells by quantisation."""
    assert result.exit_code == 0, result.output
    cells = (
        [cell.strip() for cell in line.strip("│ ").split("│")] for line in result.stdout.splitlines() if "│" in line
    )
    return {name: others for name, *others in cells}


def test_it_compares_quantisations_on_a_text(doctor: Callable[..., Result]) -> None:
    told = rows(doctor(b"a text of letters " * 20, "--quantization", "nf4,none", "--max-model-len", "64"))
    assert list(told) == ["none", "nf4"]
    perplexities = {name: float(cells[0]) for name, cells in told.items()}
    assert told["none"][1:3] == ["1.0000", "none"]
    assert float(told["nf4"][1]) == pytest.approx(perplexities["nf4"] / perplexities["none"], rel=1e-3)
    assert 5 < float(told["nf4"][2].rstrip("%")) < 15, "NF4 loses about a tenth"
    assert told["none"][3] == "16.000"


def test_a_checkpoint_that_came_quantised_has_one_row(
    doctor: Callable[..., Result], random_base: Path, tmp_path: Path
) -> None:
    quantised = rows(doctor(b"a text of letters", "--quantization", "nf4"))["nf4"]
    (cached,) = (path for path in (tmp_path / "cache" / "nf4").iterdir() if path.is_dir())
    (cached / "tokenizer.json").write_bytes((random_base / "tokenizer.json").read_bytes())
    told = rows(doctor(b"a text of letters", "--base", str(cached)))
    assert list(told) == ["nf4"]
    assert told["nf4"][0] == quantised[0]
    assert told["nf4"][1] == "unknown"


def test_a_quantisation_that_the_base_cannot_have_is_told_below_the_others(doctor: Callable[..., Result]) -> None:
    """Its 48 inputs make no whole groups of 64."""
    result = doctor(b"a text of letters")
    assert list(rows(result)) == ["none", "nf4", "fp4", "int8"]
    assert "int4: model.layers.0" in result.stdout
    assert "no multiple of the group size 64" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"", (), "text holds too little text"),
        (b"\n \n", (), "text holds too little text"),
        (b"x", (), "text holds too little text"),
        (b"abc\xff\xfe", (), "text is no text in UTF-8 (byte 3)"),
        (b"abc\0def", (), "text is no text: it has bytes that are 0"),
        (b"some text", ("--quantization", "nf4,nf5"), "not nf5"),
        (b"some text", ("--max-model-len", "1"), "--max-model-len should be at least 2"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(
    content: bytes, flags: tuple[str, ...], message: str, doctor: Callable[..., Result], tmp_path: Path
) -> None:
    result = doctor(content, *flags)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "cache").exists()


def test_flags_of_a_base_need_a_text() -> None:
    result = CliRunner().invoke(app, ["doctor", "--base", "somewhere"])
    assert result.exit_code == 1
    assert "--perplexity FILE" in result.output

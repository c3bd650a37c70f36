"""The file of results as others find it."""

import json
from pathlib import Path

import pytest

from onebase_server.bench.results_file import replace_json


def test_whoever_reads_the_file_finds_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    replace_json(file, {"trials": [1]})
    write_text = Path.write_text

    def write_half(path: Path, text: str) -> None:
        write_text(path, text[: len(text) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space left"):
        replace_json(file, {"trials": [1, 2]})
    assert json.loads(file.read_text()) == {"trials": [1]}
    monkeypatch.undo()
    replace_json(file, {"trials": [1, 2]})
    assert json.loads(file.read_text()) == {"trials": [1, 2]}
    assert list(tmp_path.iterdir()) == [file]

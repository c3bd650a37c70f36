"""`onebase serve` as an operator sees it: a process, its announcement, its end."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


@contextmanager
def onebase_serve(base: Path, directory: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    onebase = Path(sys.executable).with_name("onebase")
    command = [str(onebase), "serve", "--base", str(base), "--store", str(directory / "store"), "--port", "0"]
    command += ["--cache-dir", str(directory / "cache"), "--quantization", "none", "--threads", "1"]
    process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True, cwd=directory)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """Read the process's words until one matches."""
    assert process.stderr is not None
    heard = ""
    for line in process.stderr:
        heard += line
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"it ended without {pattern!r}:\n{heard}")


def test_the_announcement_names_the_address_and_sigterm_ends_the_server_with_its_engine(tiny_base, tmp_path):
    with onebase_serve(tiny_base, tmp_path) as process:
        url = read_until(process, r"on (http://\S+:\d+),").group(1)
        read_until(process, r"base +tiny in ")
        read_until(process, r"adapters +none yet")
        read_until(process, "Ready")
        assert httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "x"}).status_code == 200
        engine = Path(f"/proc/{Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().strip()}")
        assert engine.is_dir()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
        assert not engine.exists()


def test_an_engine_that_can_never_start_ends_the_server_with_the_reason(tiny_base, tmp_path):
    with onebase_serve(tiny_base, tmp_path, "--kv-cache-memory", "1B") as process:
        read_until(process, r"Error: .*--kv-cache-memory")
        assert process.wait(timeout=20) == 1

"""`onebase serve` as an operator sees it: a process, its announcement, its end."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families


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
        read_until(process, r"weights +\d+ MiB: linears \d+ \((16|32)\.000 bits a parameter\), embedding and head ")
        read_until(process, r"error +none: nothing is quantised")
        read_until(process, r"memory +\d+ MiB: weights \d+, KV cache ")
        assert httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "x"}).status_code == 200
        engine = Path(f"/proc/{engine_of(process)}")
        assert engine.is_dir()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
        assert not engine.exists()


def test_metrics_divide_the_resident_memory_of_both_processes_into_parts(tiny_base, tmp_path):
    with onebase_serve(tiny_base, tmp_path) as process:
        url = read_until(process, r"on (http://\S+:\d+),").group(1)
        read_until(process, "Ready")
        httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1}, timeout=30)
        parts = memory_parts(httpx.get(f"{url}/metrics").text)
        assert set(parts) == {"weights", "kv_cache", "adapters", "activations", "runtime", "api"}
        assert parts["weights"] > 0 < parts["kv_cache"]
        assert sum(parts.values()) == pytest.approx(resident(process.pid) + resident(engine_of(process)), rel=0.02)


def memory_parts(exposition: str) -> dict[str, float]:
    families = {family.name: family for family in text_string_to_metric_families(exposition)}
    return {sample.labels["part"]: sample.value for sample in families["onebase_memory_bytes"].samples}


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def engine_of(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


def test_an_engine_that_can_never_start_ends_the_server_with_the_reason(tiny_base, tmp_path):
    with onebase_serve(tiny_base, tmp_path, "--kv-cache-memory", "1B") as process:
        read_until(process, r"Error: .*--kv-cache-memory")
        assert process.wait(timeout=20) == 1

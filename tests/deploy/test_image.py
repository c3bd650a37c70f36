"""What the Dockerfile promises. No Docker engine is needed: the file is parsed, and the health check is run by hand."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]


def last_stage(dockerfile: DockerfileParser) -> list[tuple[str, str]]:
    instructions = [(line["instruction"], line["value"]) for line in dockerfile.structure]
    start = max(index for index, (name, _) in enumerate(instructions) if name == "FROM")
    return instructions[start:]


def values(dockerfile: DockerfileParser, instruction: str) -> list[str]:
    return [value for name, value in last_stage(dockerfile) if name == instruction]


def copied_from_context(dockerfile: DockerfileParser) -> set[str]:
    copies = [line["value"].split() for line in dockerfile.structure if line["instruction"] == "COPY"]
    return {source for words in copies if not words[0].startswith("--from") for source in words[:-1]}


@pytest.fixture
def alive_port() -> Iterator[int]:
    """The port of a server whose /health answers, as ours does."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Health)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_the_server_runs_as_a_user_with_a_fixed_id_who_is_not_root(dockerfile):
    (user,) = values(dockerfile, "USER")
    uid, gid = map(int, user.split(":"))
    assert uid >= 10000
    (accounts,) = (value for value in values(dockerfile, "RUN") if "useradd" in value)
    assert f"--uid {uid}" in accounts
    assert f"--gid {gid}" in accounts


def test_no_build_step_runs_after_the_user_is_dropped(dockerfile):
    names = [name for name, _ in last_stage(dockerfile)]
    assert "RUN" not in names[names.index("USER") :]


def test_the_compiler_stays_out_of_the_final_stage(dockerfile):
    assert "gcc" in dockerfile.content
    assert not any("gcc" in value for value in values(dockerfile, "RUN"))


def test_every_installed_version_is_pinned(dockerfile):
    installs = [line["value"] for line in dockerfile.structure if "pip install" in line["value"]]
    assert installs
    for install in installs:
        assert "--constraint constraints.txt" in install or "--no-index --no-deps" in install


def test_the_entry_point_gets_signals_itself(dockerfile):
    assert json.loads(values(dockerfile, "ENTRYPOINT")[0]) == ["onebase"]
    assert json.loads(values(dockerfile, "CMD")[0]) == ["serve"]
    assert values(dockerfile, "STOPSIGNAL") == ["SIGTERM"]


def test_the_health_check_tells_alive_from_dead(dockerfile, alive_port):
    (healthcheck,) = values(dockerfile, "HEALTHCHECK")
    python, *arguments = json.loads(healthcheck.partition("CMD ")[2])
    assert python == "python"

    def status(port: int) -> int:
        command = [sys.executable, *arguments]
        return subprocess.run(command, env={"ONEBASE_PORT": str(port)}, stderr=subprocess.DEVNULL).returncode

    assert status(alive_port) == 0
    assert status(9) != 0  # "discard": nobody listens there


def test_the_image_holds_no_secret(dockerfile):
    arguments = [line["value"].partition("=")[0] for line in dockerfile.structure if line["instruction"] == "ARG"]
    secret = re.compile("KEY|TOKEN|PASSWORD|SECRET")
    assert [name for name in (*dockerfile.envs, *arguments) if secret.search(name)] == []


def test_the_build_context_is_just_what_is_copied(dockerfile):
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied_from_context(dockerfile)


def test_everything_that_is_copied_exists(dockerfile):
    assert [source for source in copied_from_context(dockerfile) if not (ROOT / source).exists()] == []

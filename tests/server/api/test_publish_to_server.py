"""`--server URL` of `onebase tune` and `onebase adapters merge` against a running server."""

import pytest
from rich.console import Console

from onebase_server.commands.upload import publish_to_server
from onebase_server.errors import ConfigurationError

from .conftest import RunningServer, write_peft


def test_a_directory_is_published_to_a_running_server(server: RunningServer, tmp_path):
    directory = write_peft(tmp_path / "peft", server.context.store.layout, seed=3)
    publish_to_server("tuned", directory, f"{server.url}/", Console(quiet=True))
    assert server.get("/v1/adapters/tuned").json()["version"] == 1


def test_a_refusal_says_why(server: RunningServer, tmp_path):
    directory = write_peft(tmp_path / "peft", server.context.store.layout, seed=3)
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"refused it: .*peft_type"):
        publish_to_server("refused", directory, server.url, Console(quiet=True))
    assert server.get("/v1/adapters/refused").status_code == 404

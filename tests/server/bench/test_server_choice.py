from pathlib import Path

import pytest

from onebase_server.bench.server_choice import Vocabulary, read_compared_servers
from onebase_server.errors import ConfigurationError


def test_a_compared_server_is_a_name_an_address_and_what_is_known_of_it() -> None:
    texts = ["ours=http://127.0.0.1:8000/v1", "llama.cpp=http://127.0.0.1:8080,dialect=llama.cpp,pid=12,model=m"]
    servers = read_compared_servers(texts, Vocabulary(vocab_size=500, tokenizer=Path("words")))
    assert list(servers) == ["ours", "llama.cpp"]
    ours, other = servers.values()
    assert (ours.url, ours.dialect, ours.server_pid, ours.vocab_size) == ("http://127.0.0.1:8000", "openai", None, 500)
    assert (other.dialect, other.server_pid, other.model, other.tokenizer) == ("llama.cpp", 12, "m", Path("words"))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["http://127.0.0.1:8000"], "is not NAME=URL"),
        (["a=127.0.0.1:8000"], "has to begin with http"),
        (["a=http://x,dialect=tgi"], "dialect: Input should be 'openai' or 'llama.cpp'"),
        (["a=http://x,pid=one"], "server_pid: Input should be a valid integer"),
        (["a=http://x,speed=high"], "speed is not known; behind the address may stand dialect, model, pid"),
        (["a=http://x", "a=http://y"], "there is another server named a"),
    ],
)
def test_what_is_wrong_with_a_compared_server_is_told(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_compared_servers(texts, Vocabulary())

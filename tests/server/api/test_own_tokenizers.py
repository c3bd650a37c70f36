"""Adapters that bring a chat template or tokens of their own, published and asked over HTTP."""

import json
from typing import Any

import pytest

from onebase_server.api.tokenizers import Tokenizers

from .conftest import BASE_NAME, CHAT_TEMPLATE, END, RunningServer, run_server, write_peft

OWN_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
QUESTION = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def publish_files(server: RunningServer, write_adapter, tmp_path):
    """Upload a random adapter with these files beside it; returns what the server says of it."""

    def upload(name: str, files: dict[str, str], status: int = 201, **arguments: Any) -> dict[str, Any]:
        directory = write_adapter(tmp_path / "peft", **arguments)
        parts = {file.name: file.read_bytes() for file in directory.iterdir()}
        parts |= {file: content.encode() for file, content in files.items()}
        response = server.post("/v1/adapters", data={"name": name}, files=parts)
        assert response.status_code == status, response.text
        return response.json()

    return upload


def chat(server: RunningServer, model: str, status: int = 200, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "messages": QUESTION, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **fields}
    response = server.post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    return response.json()


def complete(server: RunningServer, model: str, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **fields}
    response = server.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in answer["choices"]]


def test_a_chat_is_rendered_with_the_template_of_the_version_that_is_asked(server, publish_files):
    assert publish_files("own-a", {"chat_template.jinja": OWN_TEMPLATE})["own_tokenizer"] == ["chat_template"]
    assert publish_files("own-a", {"chat_template.jinja": "({{ messages[0].content }})"})["version"] == 2
    assert publish_files("own-a", {})["own_tokenizer"] == []
    prompts = {"own-a@1": f"<user>Hi{END}", "own-a@2": "(Hi)", "own-a": "[user]Hi\n[assistant]"}
    for model, prompt in prompts.items():
        answer, expected = chat(server, model), complete(server, model, prompt)
        assert texts(answer) == texts(expected)
        assert answer["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    server.post("/v1/adapters/own-a/rollback", json={"version": 1})
    assert texts(chat(server, "own-a")) == texts(chat(server, "own-a@1"))


def test_the_lists_say_what_an_adapter_brings(server, publish_files):
    publish_files("own-b", {"chat_template.jinja": OWN_TEMPLATE})
    (card,) = (card for card in server.get("/v1/models").json()["data"] if card["id"] == "own-b")
    assert card["own_tokenizer"] == ["chat_template"]
    assert server.get("/v1/adapters/own-b").json()["own_tokenizer"] == ["chat_template"]
    assert server.get(f"/v1/models/{BASE_NAME}").json()["own_tokenizer"] == []


def test_a_copy_of_the_bases_tokenizer_is_the_bases(server, publish_files):
    config = {"eos_token": END, "pad_token": END, "chat_template": CHAT_TEMPLATE}
    assert publish_files("own-c", {"tokenizer_config.json": json.dumps(config)})["own_tokenizer"] == []


def test_an_adapters_end_token_ends_its_answers_beside_the_bases(server, publish_files):
    publish_files("own-d", {})
    text = texts(complete(server, "own-d", "Once", max_tokens=12))[0]
    end = text[5]
    card = publish_files("own-d", {"tokenizer_config.json": json.dumps({"eos_token": end})})
    assert card["own_tokenizer"] == ["special_tokens"]
    answer = complete(server, "own-d", "Once", max_tokens=12, ignore_eos=False)
    assert texts(answer) == [text[: text.index(end)]]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert texts(complete(server, "own-d@1", "Once", max_tokens=12, ignore_eos=False)) == [text.split(END)[0]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"chat_template.jinja": "{% if %}"}, "The chat template is not valid"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json is not valid JSON"),
    ],
)
def test_a_refusal_says_what_is_wrong_with_which_file(server, publish_files, files, message):
    error = publish_files("own-e", files, status=422)["error"]
    assert error["code"] == "invalid_adapter_tokenizer"
    assert message in error["message"]
    assert server.get("/v1/adapters/own-e").status_code == 404


def test_what_the_template_refuses_is_the_requests_fault(server, publish_files):
    publish_files("own-f", {"chat_template.jinja": "{{ raise_exception('Ask nicely.') }}"})
    assert "Ask nicely." in chat(server, "own-f", status=400)["error"]["message"]
    publish_files("own-f", {"chat_template.jinja": "{{ 1 // (messages | length - 1) }}"})
    assert "cannot render" in chat(server, "own-f", status=400)["error"]["message"]
    server.wait_until(lambda: server.context.admission.in_flight == 0)


def test_parts_of_a_combination_have_to_write_prompts_alike(server, publish_files):
    for seed, name in enumerate(("own-g", "own-h")):
        publish_files(name, {"chat_template.jinja": OWN_TEMPLATE}, seed=seed)
    publish_files("own-i", {}, seed=2)
    alike = [{"name": "own-g", "weight": 0.5}, {"name": "own-h", "weight": 0.5}]
    answer = chat(server, BASE_NAME, adapter=alike)
    assert texts(answer) == texts(complete(server, BASE_NAME, f"<user>Hi{END}", adapter=alike))
    error = chat(server, BASE_NAME, adapter=[*alike, {"name": "own-i"}], status=400)["error"]
    assert "own-g@1 and own-i@1 cannot be combined: their tokenizers or chat templates differ" in error["message"]


def test_an_adapter_with_a_template_can_chat_on_a_base_without_one(tiny_base, make_settings, tmp_path):
    base = tmp_path / BASE_NAME
    base.mkdir()
    for file in tiny_base.iterdir():
        (base / file.name).symlink_to(file)
    (base / "tokenizer_config.json").unlink()
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    with run_server(make_settings(base=str(base))) as server:
        directory = write_peft(tmp_path / "peft", server.context.store.layout)
        server.context.store.publish("mute", directory)
        (directory / "chat_template.jinja").write_text(OWN_TEMPLATE)
        server.context.store.publish("chatty", directory)
        assert "no chat template" in chat(server, "mute", status=400)["error"]["message"]
        assert texts(chat(server, "chatty")) == texts(complete(server, "mute", f"<user>Hi{END}"))


async def test_of_many_tokenizers_only_the_latest_used_are_kept_and_the_rest_read_again(server, publish_files):
    store, base = server.context.store, server.context.tokenizers.base
    digests = []
    for number in range(4):
        publish_files("own-j", {"chat_template.jinja": f"{number}: {{{{ messages[0].content }}}}"})
        digests.append(store.resolve("own-j").tokenizer_digest)
    tokenizers = Tokenizers(base, store, max_kept=2)
    for number in (0, 1, 2, 3, 2, 0):
        tokenizer = await tokenizers.of(digests[number])
        assert tokenizer.render_chat(QUESTION) == f"{number}: Hi"
        assert len(tokenizers) <= 2
    assert await tokenizers.of(digests[2]) is await tokenizers.of(digests[2])
    assert await tokenizers.of(None) is base

"""Adapters that bring a chat template or tokens of their own, published and asked over HTTP."""

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from onebase_server.api.tokenizers import LEAST_BYTES, Tokenizers
from onebase_server.model.template_process import RENDER_SECONDS
from onebase_server.settings import Settings

from .conftest import BASE_NAME, CHAT_TEMPLATE, END, ENGINE, LETTERS, RunningServer, run_server, write_peft

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


def complete(server: RunningServer, model: str, prompt: str | list[int], **fields: Any) -> dict[str, Any]:
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


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_never_ends_harms_its_own_requests_only(server, publish_files):
    publish_files("own-k", {"chat_template.jinja": ENDLESS})
    publish_files("own-l", {"chat_template.jinja": OWN_TEMPLATE})
    with ThreadPoolExecutor() as threads:
        endless = [threads.submit(chat, server, "own-k", 400) for _ in range(2)]
        started = time.monotonic()
        while not all(request.done() for request in endless):
            chat(server, BASE_NAME)
            chat(server, "own-l")
        answered = time.monotonic() - started
    assert answered > RENDER_SECONDS
    assert all("took more than 2 s" in request.result()["error"]["message"] for request in endless)
    assert texts(chat(server, "own-l")) == texts(complete(server, "own-l", f"<user>Hi{END}"))
    server.wait_until(lambda: server.context.admission.in_flight == 0)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ 'a' * 5 * 10**6 }}", "made 5,000,000 characters"),
    ],
)
def test_a_template_that_takes_much_memory_is_refused_its_messages(server, publish_files, template, message):
    publish_files("own-m", {"chat_template.jinja": template})
    assert message in chat(server, "own-m", status=400)["error"]["message"]


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
    tokenizers = Tokenizers(base, store, max_kept_bytes=2 * LEAST_BYTES)
    for number in (0, 1, 2, 3, 2, 0):
        tokenizer = await tokenizers.of(digests[number])
        assert tokenizer.render_chat(QUESTION) == f"{number}: Hi"
        assert tokenizers.kept_bytes <= 2 * LEAST_BYTES
    assert await tokenizers.of(digests[2]) is await tokenizers.of(digests[2])
    assert await tokenizers.of(None) is base
    alone = Tokenizers(base, store, max_kept_bytes=0)  # what is asked for is there, however large
    assert (await alone.of(digests[0])).render_chat(QUESTION) == "0: Hi"
    await alone.of(digests[1])
    assert alone.kept_bytes == LEAST_BYTES


def test_tokens_with_embeddings_of_the_adapters_are_asked_and_answered_as_text(server, tiny_base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_tokens(["<one>", "<two>"])
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():  # the last one is by far the likeliest behind itself
        hidden = model.model(input_ids=torch.tensor([[len(tokenizer) - 1]])).last_hidden_state[0, -1]
        model.lm_head.weight[-1] = 9 * hidden * model.lm_head.weight.norm(dim=1).max() / hidden.norm()
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    version = server.context.store.publish("own-l", tmp_path)
    assert (version.vocab_size, version.tokenizer_parts) == (len(tokenizer), ("tokens",))
    answer = complete(server, "own-l", "<two>", max_tokens=1)
    assert texts(answer) == ["<two>"]
    assert answer["usage"]["prompt_tokens"] == 1


class TestAddedTokens:
    """On a base with embeddings for more tokens than its tokenizer has, as many models are padded."""

    @pytest.fixture(scope="class")
    def padded_base(self, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        directory = tmp_path_factory.mktemp("padded") / BASE_NAME
        model = LlamaForCausalLM.from_pretrained(tiny_base)
        torch.manual_seed(1)
        model.resize_token_embeddings(model.config.vocab_size + 2, mean_resizing=False)
        model.save_pretrained(directory)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_base / name, directory)
        return directory

    @pytest.fixture(scope="class")
    def padded_server(self, padded_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
        directory = tmp_path_factory.mktemp("padded-server")
        paths = {"base": str(padded_base), "store": directory / "store", "cache_dir": directory / "cache"}
        with run_server(Settings(**paths, **ENGINE)) as running:
            yield running

    @pytest.fixture(scope="class")
    def transformers(self, padded_base: Path, padded_server: RunningServer, tmp_path_factory) -> Any:
        """What Transformers makes of the files of the adapter `tools`, which is published."""
        directory = write_peft(tmp_path_factory.mktemp("tools"), padded_server.context.store.layout, size=0.1)
        tokenizer = AutoTokenizer.from_pretrained(padded_base)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
        tokenizer.add_tokens(["<tool>"])
        tokenizer.chat_template = "<turn>{{ messages[0].content }}<tool>"
        tokenizer.save_pretrained(directory)
        card = padded_server.context.store.publish("tools", directory)
        assert card.tokenizer_parts == ("tokens", "chat_template")
        return AutoTokenizer.from_pretrained(directory)

    def test_a_chat_is_rendered_and_encoded_as_transformers_does(self, padded_server, transformers):
        answer = chat(padded_server, "tools")
        ids = transformers.apply_chat_template(QUESTION, return_dict=False)
        assert answer["usage"]["prompt_tokens"] == len(ids) == 4
        assert texts(answer) == texts(complete(padded_server, "tools", ids))
        assert texts(answer) == texts(complete(padded_server, "tools", "<turn>Hi<tool>"))

    def test_added_tokens_are_answered_and_streamed_as_transformers_decodes_them(self, padded_server, transformers):
        fields = {"max_tokens": 300, "temperature": 1.5, "seed": 3, "logprobs": 0}
        answer = complete(padded_server, "tools", "Once", **fields)
        tokens = answer["choices"][0]["logprobs"]["tokens"]
        assert {"<turn>", "<tool>"} <= set(tokens)
        ids = transformers.convert_tokens_to_ids(tokens)
        assert texts(answer) == [transformers.decode(ids, skip_special_tokens=True)]
        assert "<turn>" not in texts(answer)[0]
        body = {"model": "tools", "prompt": "Once", "ignore_eos": True, "stream": True, **fields}
        events = padded_server.post("/v1/completions", json=body).text.split("\n\n")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events if "{" in event]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == texts(answer)[0]

    def test_added_tokens_stop_an_answer_by_text_and_by_id(self, padded_server, transformers):
        fields = {"max_tokens": 300, "temperature": 1.5, "seed": 3}
        (whole,) = texts(complete(padded_server, "tools", "Once", **fields))
        expected = whole[: whole.index("<tool>")]
        assert texts(complete(padded_server, "tools", "Once", stop="<tool>", **fields)) == [expected]
        tool = transformers.convert_tokens_to_ids("<tool>")
        assert texts(complete(padded_server, "tools", "Once", stop_token_ids=[tool], **fields)) == [expected]

    def test_an_echo_of_token_ids_shows_the_added_tokens(self, padded_server, transformers):
        ids = transformers.encode("a<tool>b")
        answer = complete(padded_server, "tools", ids, echo=True, max_tokens=0, logprobs=0)
        assert texts(answer) == ["a<tool>b"]
        assert answer["choices"][0]["logprobs"]["tokens"] == ["a", "<tool>", "b"]
        assert answer["choices"][0]["logprobs"]["text_offset"] == [0, 1, 7]

    def test_the_base_beside_it_knows_nothing_of_them(self, padded_server, transformers):
        answers = [complete(padded_server, model, "a<tool>b", max_tokens=1) for model in ("tools", BASE_NAME)]
        assert [answer["usage"]["prompt_tokens"] for answer in answers] == [3, 8]

    def test_a_token_that_has_no_embedding_is_refused(self, server, publish_files, tiny_base):
        content = json.loads((tiny_base / "tokenizer.json").read_text())
        content["added_tokens"].append({**content["added_tokens"][0], "id": len(LETTERS) + 1, "content": "<tool>"})
        error = publish_files("own-k", {"tokenizer.json": json.dumps(content)}, status=422)["error"]
        assert error["code"] == "unsupported_adapter"
        assert "'<tool>' the id 97, but there are embeddings for 97 tokens only" in error["message"]

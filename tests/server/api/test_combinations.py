"""`adapter`: a request on the weighted sum of several adapters."""

import json

import numpy as np
import pytest
from safetensors.numpy import save

from .conftest import BASE_NAME, RunningServer

PROMPT = {"prompt_embeddings": np.ones((4, 32), np.float32)}
IA3 = {"base_model.model.model.layers.0.self_attn.k_proj.ia3_l": np.ones((16, 1), np.float32)}


@pytest.fixture(scope="module")
def names() -> tuple[str, str]:
    return "mix-one", "mix-two"


@pytest.fixture(autouse=True)
def published(publish, names):
    for seed, name in enumerate(names, start=40):
        publish(name, seed=seed, size=0.3)


def complete(server: RunningServer, adapter, status=200, model=BASE_NAME, **fields):
    body = {"model": model, "prompt": "Once upon", "max_tokens": 12, "temperature": 0, "adapter": adapter, **fields}
    response = server.post("/v1/completions", json=body)
    assert response.status_code == status, response.text
    return response.json()


def text(answer) -> str:
    return answer["choices"][0]["text"]


def weighted(*parts: tuple[str, float]) -> list[dict[str, object]]:
    return [{"name": name, "weight": weight} for name, weight in parts]


def test_weights_decide_what_each_adapter_says(server, names):
    one, two = names
    alone = [text(complete(server, None, model=name)) for name in names]
    assert [text(complete(server, weighted((one, a), (two, b)))) for a, b in ((1, 0), (0, 1))] == alone
    assert text(complete(server, weighted((one, 0.5), (two, 0.5)))) not in alone
    assert text(complete(server, weighted((one, 0), (two, 0)))) == text(complete(server, None))


def test_one_name_without_a_weight_is_that_adapter(server, names):
    answer, alone = complete(server, [{"name": names[0]}]), complete(server, None, model=names[0])
    assert text(answer) == text(alone)
    assert answer["system_fingerprint"] == alone["system_fingerprint"]


def test_the_answer_says_which_versions_spoke_and_each_is_counted(server, names, publish):
    version = publish(names[1], seed=44)["version"]
    before = [server.metric("onebase_adapter_requests_total", adapter=name) for name in names]
    answer = complete(server, weighted((f"{names[0]}@1", 0.7), (names[1], 0.3)))
    assert answer["model"] == BASE_NAME
    assert set(answer["system_fingerprint"].split("+")) == {f"0.7*{names[0]}@1", f"0.3*{names[1]}@{version}"}
    after = [server.metric("onebase_adapter_requests_total", adapter=name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


def test_chat_takes_combinations_too(server, names):
    body = {"model": BASE_NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    response = server.post("/v1/chat/completions", json=body | {"adapter": weighted((names[0], 0.5), (names[1], 0.5))})
    assert response.status_code == 200
    assert "0.5*mix-one@" in response.json()["system_fingerprint"]


@pytest.mark.parametrize(
    ("adapter", "status", "param", "message"),
    [
        (weighted(("mix-one", 0.5), ("parrot", 0.5)), 404, "adapter", "The model parrot does not exist"),
        (weighted(("mix-one", 0.5), ("mix-one", 0.5)), 400, "adapter", "the same adapter twice"),
        (weighted((BASE_NAME, 0.5)), 400, "adapter", "is the base"),
        (weighted(("mix-one", 101)), 400, "adapter.0.weight", "less than or equal to 100"),
        ([{"name": "mix-one", "share": 1}], 400, "adapter.0.share", "not"),
        ([{"name": "mix-one"}] * 17, 400, "adapter", "16"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(server, adapter, status, param, message):
    error = complete(server, adapter, status)["error"]
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("name", "config", "tensors", "reason"),
    [
        ("mix-prompt", {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, PROMPT, "Virtual tokens"),
        ("mix-ia3", {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}, IA3, "(IA)³"),
    ],
)
def test_other_kinds_are_refused_by_name(server, names, name, config, tensors, reason):
    files = {"adapter_config.json": json.dumps(config), "adapter_model.safetensors": save(tensors)}
    assert server.post("/v1/adapters", data={"name": name}, files=files).status_code == 201
    error = complete(server, weighted((names[0], 0.5), (name, 0.5)), 400)["error"]
    assert error["message"].startswith(f"{name}@1 cannot be part of a combination.")
    assert reason in error["message"]
    assert complete(server, [{"name": name}])["system_fingerprint"] == f"{name}@1"


def test_beside_adapter_the_model_is_the_base(server, names):
    error = complete(server, weighted((names[0], 0.5)), 400, model=names[1])["error"]
    assert error["param"] == "model"
    assert f"has to be the base, {BASE_NAME}" in error["message"]


def test_ranks_may_add_up_to_what_one_upload_may_have(server, publish):
    versions = [publish("mix-ranks", seed=seed, rank=40)["version"] for seed in range(7)]
    names = [{"name": f"mix-ranks@{version}"} for version in versions]
    error = complete(server, names, 400)["error"]
    assert error["message"] == "The ranks add up to 280; this server allows at most 256."


def test_a_combination_that_could_never_run_is_refused(server, publish):
    names = [f"mix-large-{number}" for number in range(3)]
    for number, name in enumerate(names):
        publish(name, seed=number, rank=48)
    assert "lower" in complete(server, [{"name": name} for name in names], 507)["error"]["message"]
    assert complete(server, [{"name": names[0]}])

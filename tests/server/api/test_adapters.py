import asyncio
import hashlib
import http.client
import io
import json
import tarfile
import zipfile

import httpx
import numpy as np
import pytest
from safetensors.numpy import load, save

from onebase_server.api.upload import FRAMING_BYTES

GREEDY = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


async def answer(openai, model: str) -> str:
    return (await openai.completions.create(model=model, prompt="Who?", **GREEDY)).choices[0].text


def upload(server, name: str, archive: bytes, **fields: str) -> httpx.Response:
    return server.post("/v1/adapters", data={"name": name} | fields, files={"archive": ("a", archive)})


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def nothing_is_kept(server, name: str) -> bool:
    store = server.context.store
    return server.get(f"/v1/adapters/{name}").status_code == 404 and not list((store.root / "staging").iterdir())


async def test_an_upload_answers_with_what_was_published_and_serves_at_once(server, openai, make_archive):
    archive = make_archive(seed=1, rank=4)
    response = upload(server, "first", archive, sha256=hashlib.sha256(archive).hexdigest())
    card = response.json()
    assert response.status_code == 201
    assert (card["name"], card["version"], card["rank"], card["is_live"]) == ("first", 1, 4, True)
    assert card["source_sha256"] == hashlib.sha256(archive).hexdigest()
    assert len(card["digest"]) == 64
    assert "q_proj" in card["targets"]
    assert card["bytes"] == 4 * card["num_parameters"]
    assert server.get("/v1/adapters/first").json() == card
    assert await answer(openai, "first") != await answer(openai, "tiny")


async def test_the_names_of_a_model_all_lead_to_it(server, openai, publish):
    publish("named", seed=1)
    publish("named", seed=2)
    texts = {
        model: await answer(openai, model) for model in ("named", "tiny:named", "named@2", "tiny:named@2", "named@1")
    }
    old = texts.pop("named@1")
    assert len(set(texts.values())) == 1
    assert old not in texts.values()


async def test_files_and_tar_archives_are_taken_like_zips(server, tmp_path, make_archive):
    with zipfile.ZipFile(io.BytesIO(make_archive(seed=3))) as zipped:
        files = {name: zipped.read(name) for name in zipped.namelist()}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"folder/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    as_files = server.post("/v1/adapters", data={"name": "as-files"}, files=files)
    as_tar = upload(server, "as-tar", packed.getvalue())
    assert (as_files.status_code, as_tar.status_code) == (201, 201)
    assert as_files.json()["digest"] == as_tar.json()["digest"]
    assert as_files.json()["source_sha256"] == hashlib.sha256(files["adapter_model.safetensors"]).hexdigest()


async def test_versions_are_listed_rolled_back_and_removed(server, openai, publish):
    publish("versioned", seed=1)
    first = await answer(openai, "versioned")
    publish("versioned", seed=2)
    second = await answer(openai, "versioned")
    assert first != second
    rolled_back = server.post("/v1/adapters/versioned/rollback").json()
    assert (rolled_back["version"], rolled_back["is_live"]) == (1, True)
    assert await answer(openai, "versioned") == first
    assert server.post("/v1/adapters/versioned/rollback", json={"version": 2}).json()["version"] == 2
    versions = server.get("/v1/adapters/versioned/versions").json()["data"]
    assert [(card["version"], card["is_live"]) for card in versions] == [(1, False), (2, True)]
    assert error_of(server.post("/v1/adapters/versioned/rollback", json={"version": 9})) == (
        404,
        "adapter_version_not_found",
    )
    assert server.delete("/v1/adapters/versioned").json()["deleted"] is True
    assert error_of(server.get("/v1/adapters/versioned")) == (404, "adapter_not_found")


async def test_models_lists_the_base_first_and_then_its_adapters(server, openai, publish):
    publish("listed")
    models = (await openai.models.list()).data
    assert models[0].id == "tiny"
    card = next(model for model in models if model.id == "listed")
    assert (card.parent, card.root) == ("tiny", "listed@1")
    assert (await openai.models.retrieve("tiny:listed")).root == "listed@1"


async def test_a_running_request_keeps_its_version_while_it_is_replaced_and_removed(server, openai, publish):
    publish("swapped", seed=1)
    arguments = {"model": "swapped", "prompt": "Go", "max_tokens": 400, "temperature": 0}
    extra = {"ignore_eos": True}
    undisturbed = (await openai.completions.create(**arguments, extra_body=extra)).choices[0].text
    stream = await openai.completions.create(**arguments, extra_body=extra, stream=True)
    text = (await anext(stream)).choices[0].text
    await asyncio.to_thread(publish, "swapped", seed=2)
    await asyncio.to_thread(server.delete, "/v1/adapters/swapped")
    text += "".join([chunk.choices[0].text async for chunk in stream])
    assert text == undisturbed
    server.wait_until(lambda: server.context.admission.in_flight == 0)


async def test_an_adapter_stays_in_memory_when_its_twin_under_another_name_is_removed(server, openai, publish):
    publish("twin", seed=77)
    publish("other-twin", seed=77)
    server.delete("/v1/adapters/other-twin")
    attaches = server.metric("onebase_adapter_attaches_total")
    for _ in range(2):
        await openai.completions.create(model="twin", prompt="Hello", max_tokens=1)
    assert server.metric("onebase_adapter_attaches_total") == attaches


async def test_uploads_of_one_name_at_one_time_become_consecutive_versions(server, make_archive):
    archives = [make_archive(seed=seed) for seed in range(4)]
    responses = await asyncio.gather(*(asyncio.to_thread(upload, server, "raced", archive) for archive in archives))
    assert sorted(response.json()["version"] for response in responses) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"this is no archive", (400, "invalid_archive")),
        (b"", (400, "invalid_archive")),
        (bytes(5 << 20), (413, "upload_too_large")),
    ],
)
def test_what_is_no_archive_is_refused_and_nothing_is_kept(server, content, expected):
    assert error_of(upload(server, "broken", content)) == expected
    assert nothing_is_kept(server, "broken")


def rewritten(archive: bytes, change) -> dict[str, bytes]:
    """The two files of an archive, after `change(config, tensors)`."""
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        config = json.loads(zipped.read("adapter_config.json"))
        weights = zipped.read("adapter_model.safetensors")
    tensors = load(weights)
    change(config, tensors)
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


def poison(config, tensors):
    next(iter(tensors.values()))[0, 0] = np.nan


def ask_for_the_unspeakable(config, tensors):
    config["\ud800"] = True  # JSON can escape half of a surrogate pair, and no answer can hold it


def reshape(config, tensors):
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, :-1].copy()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (poison, "invalid_adapter_tensors"),
        (reshape, "invalid_adapter_tensors"),
        (ask_for_the_unspeakable, "unsupported_adapter"),
        (lambda config, tensors: config.update(peft_type="LOHA"), "unsupported_adapter"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_refused_and_nothing_is_kept(server, make_archive, change, code):
    response = server.post("/v1/adapters", data={"name": "unfit"}, files=rewritten(make_archive(), change))
    assert error_of(response) == (422, code)
    assert nothing_is_kept(server, "unfit")


def test_an_adapter_larger_than_the_whole_adapter_memory_is_refused_before_it_is_published(server, make_archive):
    assert error_of(upload(server, "giant", make_archive(rank=250))) == (507, "adapter_does_not_fit")
    assert nothing_is_kept(server, "giant")


def test_an_adapter_from_a_time_of_more_memory_is_refused_when_it_is_asked_for(server, write_adapter, tmp_path):
    server.context.store.publish("older", write_adapter(tmp_path / "older", rank=250))
    response = server.post("/v1/completions", json={"model": "older", "prompt": "x"})
    assert error_of(response) == (507, "adapter_does_not_fit")
    server.delete("/v1/adapters/older")


@pytest.mark.parametrize("name", ["", "../up", "a b", "tiny", "x" * 129])
def test_a_name_that_could_not_be_asked_for_is_refused(server, make_archive, name):
    status, _ = error_of(upload(server, name, make_archive()))
    assert status in (400, 422)


def test_bytes_that_are_not_those_announced_are_refused(server, make_archive):
    assert error_of(upload(server, "altered", make_archive(), sha256="0" * 64)) == (422, "digest_mismatch")
    assert nothing_is_kept(server, "altered")


@pytest.mark.parametrize(
    ("fields", "files", "message"),
    [
        ({"name": "x"}, {}, "multipart/form-data"),
        ({"name": "x"}, {"adapter_config.json": b"{}"}, "adapter_model.safetensors is missing"),
        ({"name": "x"}, {"archive": b"x", "adapter_config.json": b"{}"}, "either archive"),
        ({}, {"archive": b"x"}, "name is missing"),
        ({"name": "x", "rank": "3"}, {"archive": b"x"}, "'rank' is not supported"),
    ],
)
def test_a_form_that_is_not_one_adapter_is_explained(server, fields, files, message):
    response = server.post("/v1/adapters", data=fields, files=files)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_an_announced_length_over_the_limit_is_refused_without_reading(server):
    url = httpx.URL(server.url)
    connection = http.client.HTTPConnection(url.host, url.port, timeout=10)
    connection.putrequest("POST", "/v1/adapters")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(server.context.settings.max_upload_bytes + FRAMING_BYTES + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()

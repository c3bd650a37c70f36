import pytest


@pytest.fixture
def local(server):
    """The one folder that the server may read."""
    return server.context.settings.allow_local_paths


def load(server, name: str, path, **fields):
    return server.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)} | fields)


async def test_an_adapter_is_loaded_replaced_and_unloaded_as_with_vllm(server, openai, local, write_adapter):
    directory = write_adapter(local / "vllm", seed=1)
    assert load(server, "vllm", directory).text == "Success: LoRA adapter 'vllm' added successfully."
    assert (await openai.models.retrieve("vllm")).root == "vllm@1"
    assert load(server, "vllm", "vllm").status_code == 400  # it is there already
    assert load(server, "vllm", "vllm", load_inplace=True).status_code == 200
    assert (await openai.models.retrieve("vllm")).root == "vllm@2"
    unload = {"lora_name": "vllm"}
    assert server.post("/v1/unload_lora_adapter", json=unload).status_code == 200
    assert server.post("/v1/unload_lora_adapter", json=unload).status_code == 404


def test_nothing_outside_of_the_one_folder_is_read(server, local, tmp_path, write_adapter):
    outside = write_adapter(tmp_path / "outside")
    (local / "link").symlink_to(outside)
    linked_files = local / "linked-files"
    linked_files.mkdir()
    for file in outside.iterdir():
        (linked_files / file.name).symlink_to(file)
    for path in (outside, "../outside", "link", "linked-files", "/etc"):
        assert load(server, "outside", path).status_code == 403
    assert load(server, "outside", "missing").status_code == 400


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000, "loop"])
def test_what_is_no_path_at_all_is_refused(server, local, path):
    (local / "loop").unlink(missing_ok=True)
    (local / "loop").symlink_to("loop")
    response = load(server, "nowhere", path)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "lora_path")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "x"}),
        ("/v1/unload_lora_adapter", {"lora_name": "x"}),
    ],
)
async def test_the_routes_are_off_unless_a_folder_is_named(make_client, path, body):
    async with make_client() as client:
        response = await client.post(path, json=body)
    assert response.status_code == 403
    assert "--allow-local-paths" in response.json()["error"]["message"]

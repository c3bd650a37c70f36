import pytest

KEYS = {"api_key": "generate", "admin_key": "govern"}
GENERATION = [("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions")]
ADMINISTRATION = [
    ("GET", "/v1/adapters"),
    ("POST", "/v1/adapters"),
    ("GET", "/v1/adapters/x"),
    ("GET", "/v1/adapters/x/versions"),
    ("POST", "/v1/adapters/x/rollback"),
    ("DELETE", "/v1/adapters/x"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]
BODIES = {"/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "x"}, "/v1/unload_lora_adapter": {"lora_name": "x"}}


async def status(client, method: str, path: str, key: str | None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return (await client.request(method, path, headers=headers, json=BODIES.get(path, {}))).status_code


@pytest.mark.parametrize(("method", "path"), GENERATION)
async def test_generation_needs_one_of_the_keys(make_client, method, path):
    async with make_client(**KEYS) as client:
        assert await status(client, method, path, None) == 401
        assert await status(client, method, path, "guess") == 401
        assert await status(client, method, path, "generate") in (200, 400)
        assert await status(client, method, path, "govern") in (200, 400)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_without_a_key_a_body_is_not_even_parsed(make_client, path):
    async with make_client(**KEYS) as client:
        response = await client.post(path, content=b"{not JSON", headers={"Content-Type": "application/json"})
        assert response.status_code == 401


@pytest.mark.parametrize(("method", "path"), ADMINISTRATION)
async def test_adapters_need_the_admin_key(make_client, method, path):
    async with make_client(**KEYS) as client:
        assert await status(client, method, path, None) == 401
        assert await status(client, method, path, "generate") == 403
        assert await status(client, method, path, "govern") not in (401,)


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics", "/docs", "/openapi.json"])
async def test_what_operators_ask_needs_no_key(make_client, path):
    async with make_client(**KEYS) as client:
        assert await status(client, "GET", path, None) == 200


async def test_a_part_without_a_key_is_open(make_client):
    async with make_client(admin_key="govern") as client:
        assert await status(client, "GET", "/v1/models", None) == 200
        assert await status(client, "GET", "/v1/adapters", None) == 401


async def test_an_empty_variable_is_no_key(make_client, monkeypatch):
    monkeypatch.setenv("ONEBASE_API_KEY", "")
    monkeypatch.setenv("ONEBASE_ADMIN_KEY", "")
    async with make_client() as client:
        assert await status(client, "GET", "/v1/models", None) == 200
        assert await status(client, "GET", "/v1/adapters", None) == 200


async def test_a_missing_key_is_asked_for_as_http_does(make_client):
    async with make_client(**KEYS) as client:
        response = await client.get("/v1/models")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"

"""What the Compose files promise, and that they agree with the image and with the settings."""

import json

import pytest
import yaml

from onebase_server.settings import Settings


@pytest.fixture(params=["compose.gpu.yaml", "compose.demo.yaml"])
def override(request, deploy_dir):
    return yaml.safe_load((deploy_dir / request.param).read_text(encoding="utf-8"))


def mounts(service):
    return [volume.replace("${MODELS:-./models}", "./models").split(":")[:2] for volume in service["volumes"]]


def test_there_are_the_server_prometheus_and_grafana(compose):
    assert set(compose["services"]) == {"server", "prometheus", "grafana"}


def test_keys_and_passwords_come_from_the_environment_or_nothing_starts(compose):
    secrets = [
        value
        for service in compose["services"].values()
        for name, value in service.get("environment", {}).items()
        if name.endswith(("_KEY", "_PASSWORD"))
    ]
    assert len(secrets) == 3
    assert all(value.startswith("${") and ":?" in value for value in secrets)


def test_the_example_environment_names_every_needed_variable_and_gives_none_a_value(compose, deploy_dir):
    lines = (deploy_dir / ".env.example").read_text(encoding="utf-8").splitlines()
    empty = {line.removesuffix("=") for line in lines if line.endswith("=")}
    needed = {part.partition(":?")[0] for part in json.dumps(compose).split("${") if ":?" in part.partition("}")[0]}
    assert empty == needed


def test_every_variable_for_the_server_is_a_setting(compose, override):
    known = {f"ONEBASE_{name.upper()}" for name in Settings.model_fields}
    for part in (compose, override):
        assert set(part["services"]["server"].get("environment", {})) <= known


def test_the_servers_volumes_are_those_of_the_image(compose, dockerfile):
    (declared,) = (line["value"] for line in dockerfile.structure if line["instruction"] == "VOLUME")
    assert {target for _, target in mounts(compose["services"]["server"])} == set(json.loads(declared))


def test_every_mounted_file_or_volume_exists(compose, deploy_dir):
    for service in compose["services"].values():
        for source, _ in mounts(service):
            is_users_own = source == "./models"
            assert is_users_own or source in compose["volumes"] or (deploy_dir / source).exists(), source


def test_running_requests_may_end_before_the_container_is_killed(compose):
    from onebase_server.serving import GRACE_SECONDS

    assert int(compose["services"]["server"]["stop_grace_period"].removesuffix("s")) > GRACE_SECONDS


def test_only_this_machine_reaches_the_ports_unless_told_otherwise(compose):
    ports = [port for service in compose["services"].values() for port in service["ports"]]
    assert all(port.startswith(("127.0.0.1:", "${PUBLISH:-127.0.0.1:")) for port in ports)


def test_overrides_change_only_services_that_exist(compose, override):
    assert set(override["services"]) <= set(compose["services"])

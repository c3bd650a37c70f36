"""Prometheus and Grafana look at what the server really offers."""

import json
import re

import pytest
import yaml

METRIC = re.compile(r"\b(?:onebase_|vllm:)\w+")
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


@pytest.fixture(scope="module")
def series(metric_families):
    """Every name that a query may use."""
    return {family.name + suffix for family in metric_families for suffix in SUFFIXES[family.type]}


@pytest.fixture(scope="module")
def prometheus(deploy_dir):
    return yaml.safe_load((deploy_dir / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def alerts(deploy_dir, prometheus):
    files = [deploy_dir / "prometheus" / name for name in prometheus["rule_files"]]
    groups = [group for file in files for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def dashboard(deploy_dir):
    return json.loads((deploy_dir / "grafana" / "dashboards" / "onebase.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def panels(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_prometheus_scrapes_the_server_of_the_compose_file(prometheus, compose, dockerfile):
    (job,) = prometheus["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    service, port = target.split(":")
    assert service in compose["services"]
    assert port == dockerfile.envs["ONEBASE_PORT"]


def test_alerts_ask_for_metrics_that_the_server_has(alerts, series):
    for rule in alerts:
        assert set(METRIC.findall(rule["expr"])) <= series, rule["alert"]


def test_every_alert_says_how_bad_it_is_and_what_it_means(alerts):
    for rule in alerts:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"].endswith(".")


def test_panels_ask_for_metrics_that_the_server_has(panels, series):
    for panel in panels:
        for target in panel["targets"]:
            names = set(METRIC.findall(target["expr"]))
            assert names, panel["title"]
            assert names <= series, panel["title"]


@pytest.mark.parametrize(
    "metric",
    [
        "onebase_requests", "onebase_generated_tokens", "onebase_time_to_first_token_seconds",
        "onebase_inter_token_latency_seconds", "onebase_queue_seconds", "onebase_batch_requests",
        "onebase_distinct_adapters", "onebase_kv_blocks_used", "onebase_prefix_cache_hit_tokens",
        "onebase_adapter_memory_used_bytes", "onebase_adapter_attaches", "onebase_adapter_evictions",
        "onebase_swap_seconds", "onebase_engine_restarts", "onebase_adapter_requests",
    ],
)  # fmt: skip
def test_the_dashboard_shows(panels, metric):
    assert any(metric in target["expr"] for panel in panels for target in panel["targets"])


def test_panels_have_names_and_numbers_of_their_own_and_do_not_overlap(dashboard):
    everything = dashboard["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in everything}) == len(everything)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in everything)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)


def test_the_panels_ask_the_provisioned_data_source(dashboard, panels, deploy_dir, compose, prometheus):
    file = deploy_dir / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
    (source,) = yaml.safe_load(file.read_text(encoding="utf-8"))["datasources"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert source["url"].removeprefix("http://").partition(":")[0] in compose["services"]
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]


def test_grafana_finds_the_dashboard_where_compose_mounts_it(deploy_dir, compose):
    file = deploy_dir / "grafana" / "provisioning" / "dashboards" / "onebase.yml"
    (provider,) = yaml.safe_load(file.read_text(encoding="utf-8"))["providers"]
    folders = [volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in folders

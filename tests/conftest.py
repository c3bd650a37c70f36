"""What all tests share."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric

# Two threads that wait for each other lose whole time slices on a machine that is busy with something else, and most
# tests are too small to gain from a second one. Before torch is imported, for it reads this once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"  # before any test imports a kernel of Triton's, which is when Triton asks

from onebase_server.demo import prepare_demo
from onebase_server.metrics import Metrics


@pytest.fixture(scope="session")
def demo_base() -> Path:
    """The Hugging Face directory of the demo base, fetched and converted once into the user's cache."""
    return prepare_demo().base


@pytest.fixture(scope="session")
def metric_families() -> Sequence[Metric]:
    """Every metric that the server offers, with its type and its help."""
    return list(Metrics(base_name="base", adapter_labels=1, max_adapters=1).registry.collect())

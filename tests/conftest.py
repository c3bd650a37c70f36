from pathlib import Path

import pytest

from onebase_server.demo import prepare_demo


@pytest.fixture(scope="session")
def demo_base() -> Path:
    """The Hugging Face directory of the demo base, fetched and converted once into the user's cache."""
    return prepare_demo().base

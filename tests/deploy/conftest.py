"""The deployment's files, read as the programs that use them read them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def deploy_dir() -> Path:
    return ROOT / "deploy"


@pytest.fixture(scope="session")
def dockerfile(tmp_path_factory: pytest.TempPathFactory) -> DockerfileParser:
    """The Dockerfile, parsed; a copy, for the parser may write."""
    parser = DockerfileParser(str(tmp_path_factory.mktemp("image")))
    parser.content = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    return parser


@pytest.fixture(scope="session")
def compose(deploy_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((deploy_dir / "compose.yaml").read_text(encoding="utf-8"))
    return content

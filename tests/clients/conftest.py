"""The chat clients run in an environment of their own (scripts/test_clients chat); in others there is nothing to do."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

collect_ignore_glob = [] if importlib.util.find_spec("schemathesis") else ["test_*.py"]

KEY = "a-key-of-the-clients"


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A deployment of SmolLM2 in two pools, with a key."""
    from served import served

    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.touch(0o600)
    keys.write_text(f"clients {KEY}\n")
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with served("--api-key-file", str(keys), *tools) as url:
        yield url


@pytest.fixture(scope="session")
def key() -> str:
    """The one that the deployment knows."""
    return KEY

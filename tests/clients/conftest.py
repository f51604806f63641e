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
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For --api-key-file."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.touch(0o600)
    keys.write_text(f"clients {KEY}\n")
    return keys


@pytest.fixture(scope="session")
def url(key_file: Path) -> Iterator[str]:
    """A deployment of SmolLM2 in two pools, with a key."""
    from served import served

    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with served("--api-key-file", str(key_file), *tools) as url:
        yield url


@pytest.fixture(scope="session")
def key() -> str:
    """The one that the deployment knows."""
    return KEY

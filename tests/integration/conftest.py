"""Real deployments for the integration tests: `baton serve` over a tiny model with random weights."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from support.deployment import DEADLINE_S, Served

from baton.worker.weights.resolve import resolve

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Callable[..., Served]:
    """Start `baton WORDS…`; ended with the test."""

    def start(*words: str) -> Served:
        served = Served(*words)
        request.addfinalizer(served.close)
        return served

    return start


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory for --load-format dummy: the demo model's tokenizer, a two-layer config, no weights."""
    demo = resolve("demo")
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    config = json.loads((demo / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **TINY}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, directory)
    return directory


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=baton"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    """A client without a pool to leak."""
    with httpx.Client(timeout=DEADLINE_S) as client:
        yield client

"""A real `baton serve` for clients that live in environments of their own, where only the standard library is sure."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}


@contextmanager
def served(*flags: str, model: str = "demo") -> Iterator[str]:
    """Its URL. Ends it in order."""
    command = [str(ROOT / ".venv/bin/baton"), "serve", model, "--host", "127.0.0.1", "--port", "0", *flags]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = next((line for line in process.stdout if line.startswith("ready at ")), None)
            if line is None:
                raise RuntimeError(f"baton serve {model} has ended before it was ready")
            yield line.split()[2]
        finally:
            process.terminate()


def model_directory(model: str = "demo") -> str:
    """Where the model's weights and its tokenizer are, in Hugging Face's layout."""
    code = f"from baton.worker.weights.resolve import resolve; print(resolve({model!r}))"
    python = str(ROOT / ".venv/bin/python")
    return subprocess.run([python, "-P", "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def run_offline(*command: str, **environment: str) -> None:
    """Run a client to its end, in this terminal. Raises CalledProcessError."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env={**os.environ, **OFFLINE, **environment})

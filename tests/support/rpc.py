"""gRPC clients made from the .proto files alone, by protoc, as a team without our code would have them."""

import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

PROTO = Path(__file__).parents[2] / "proto"


@dataclass(frozen=True)
class Generated:
    """The modules that protoc has written."""

    inference: ModuleType
    inference_stub: Any
    admin: ModuleType
    admin_stub: Any


def generate(directory: Path) -> Generated:
    """Compile both files into `directory` and import the result."""
    command = [sys.executable, "-P", "-m", "grpc_tools.protoc", f"-I{PROTO}"]
    command += [f"--python_out={directory}", f"--grpc_python_out={directory}", "inference.proto", "admin.proto"]
    subprocess.run(command, check=True)
    sys.path.insert(0, str(directory))
    try:
        modules = [
            importlib.import_module(f"{name}_pb2{kind}") for name in ("inference", "admin") for kind in ("", "_grpc")
        ]
    finally:
        sys.path.remove(str(directory))
    inference, inference_grpc, admin, admin_grpc = modules
    return Generated(inference, inference_grpc.InferenceStub, admin, admin_grpc.AdminStub)

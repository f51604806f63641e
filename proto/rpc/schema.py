"""The .proto files as Python classes, compiled in memory when a process first asks: nothing generated lies anywhere.

Compiling takes tens of milliseconds, so what a process speaks is always what the files beside this package say, in a
fresh clone and in a wheel alike.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_tools import protoc

FOLDER = Path(__file__).parents[1]
FILES = ("inference.proto", "admin.proto")
PACKAGE = "baton.v1"


def descriptor_set() -> descriptor_pb2.FileDescriptorSet:
    """All files, with their comments."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "set"
        flags = [f"-I{FOLDER}", f"--descriptor_set_out={output}", "--include_source_info"]
        if protoc.main(["protoc", *flags, *FILES]) != 0:
            raise RuntimeError(f"protoc refused {', '.join(FILES)}; it has said why")
        return descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes())


class Schema:
    """Messages and services by their names in the package."""

    def __init__(self, files: descriptor_pb2.FileDescriptorSet) -> None:
        self.pool = descriptor_pool.DescriptorPool()
        """For reflection, with the services that every server has. It is not the default one, so that a client made
        from the same files can live in the same process."""
        for served in (health_pb2, reflection_pb2):
            self.pool.AddSerializedFile(served.DESCRIPTOR.serialized_pb)
        for file in files.file:
            file.ClearField("source_code_info")
            self.pool.AddSerializedFile(file.SerializeToString())

    def message(self, name: str) -> Any:
        """The class of a message."""
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))

    def service(self, name: str) -> ServiceDescriptor:
        """A service's methods with their types."""
        return self.pool.FindServiceByName(f"{PACKAGE}.{name}")

    def enum(self, name: str) -> dict[str, int]:
        """An enum's values, without the prefix that its names share: STOP for FINISH_REASON_STOP."""
        values = self.pool.FindEnumTypeByName(f"{PACKAGE}.{name}").values_by_name
        prefix = next(iter(values)).removesuffix("UNSPECIFIED")
        return {full.removeprefix(prefix): value.number for full, value in values.items()}


@functools.cache
def schema() -> Schema:
    """This process's."""
    return Schema(descriptor_set())

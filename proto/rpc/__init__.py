"""gRPC around the .proto files: the compiled schema, a server and a client. Whatever is imported from here needs the
extra `grpc`, and says so."""

from importlib.util import find_spec

from baton.proto.errors import UserError

_missing = [name for name in ("grpc", "grpc_health", "grpc_reflection", "grpc_tools") if find_spec(name) is None]
if _missing:
    raise UserError(f"gRPC needs the extra grpc ({', '.join(_missing)} missing): pip install 'baton-serve[grpc]'")

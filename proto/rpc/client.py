"""A blocking client for one service, with one method per RPC in snake case."""

import re
from pathlib import Path
from typing import Any, Self

import grpc
from google.protobuf.message_factory import GetMessageClass

from baton.proto.errors import UserError
from baton.proto.rpc.schema import schema

RpcError = grpc.RpcError


class RpcClient:
    """A channel to one server. Use it in a `with` block."""

    def __init__(self, service: str, address: str, *, api_key: str = "", tls_ca: str = "") -> None:
        """`tls_ca` names a PEM file with the certificates to trust; empty: no TLS."""
        self._channel = _secure(address, tls_ca) if tls_ca else grpc.insecure_channel(address)
        self._metadata = [("authorization", f"Bearer {api_key}")] if api_key else []
        self._calls: dict[str, tuple[Any, Any]] = {}
        descriptor = schema().service(service)
        for method in descriptor.methods:
            request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
            make = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
            path = f"/{descriptor.full_name}/{method.name}"
            name = re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower()
            self._calls[name] = make(path, request.SerializeToString, response.FromString), request

    def call(self, rpc: str, timeout_s: float | None = None, **fields: Any) -> Any:
        """The response, or an iterator of responses. Raises RpcError."""
        invoke, request = self._calls[rpc]
        return invoke(request(**fields), timeout=timeout_s, metadata=self._metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()


def _secure(address: str, tls_ca: str) -> grpc.Channel:
    try:
        trusted = Path(tls_ca).read_bytes()
    except OSError as error:
        raise UserError(f"{tls_ca}: {error.strerror}") from error
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted))

"""A gRPC server on the running event loop: services from the schema, health, reflection, TLS and keys.

An implementation has one method per RPC, in snake case. A unary one is a coroutine `(request, context) -> response`, a
streaming one a coroutine that writes with `await context.write(response)`: when the call is cancelled or its deadline
passes, the coroutine is cancelled where it waits, and what it holds is freed by its own `with` blocks.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.proto.address import bracketed
from baton.proto.config import RpcConfig
from baton.proto.errors import UserError
from baton.proto.keys import Keyring, bearer_key, key_name
from baton.proto.rpc.schema import schema

log = logging.getLogger(__name__)

MAX_DETAILS_BYTES = 1300
"""Of an error's text, which may quote what a client sent. It travels percent-encoded in the trailing metadata, of which
peers take no more than 8 KiB."""
HEALTH = "/grpc.health.v1.Health/"
"""Needs no key, as /health over HTTP."""

Context: TypeAlias = grpc.aio.ServicerContext
Method = Callable[[Any, Context], Awaitable[Any]]
Around = Callable[[], AbstractContextManager[None]]
"""Makes the block in which a call is answered."""


class CallError(Exception):
    """An answer other than OK. The message is for the client: what is wrong and what to do."""

    def __init__(self, code: grpc.StatusCode, message: str, retry_after_s: float | None = None) -> None:
        """`retry_after_s` tells clients that retry by themselves how long to wait."""
        super().__init__(message.encode()[:MAX_DETAILS_BYTES].decode(errors="ignore"))
        self.code = code
        self.trailing = () if retry_after_s is None else (("grpc-retry-pushback-ms", str(round(retry_after_s * 1000))),)


class RpcServer:
    """Owns the listening port; `stop` frees it."""

    def __init__(
        self,
        config: RpcConfig,
        services: Mapping[str, object],
        around: Around = nullcontext,
    ) -> None:
        """`services`: name in the schema -> implementation. Needs a running event loop."""
        descriptors = {schema().service(name): implementation for name, implementation in services.items()}
        self._names = ["", *(service.full_name for service in descriptors)]
        self._config = config
        keys = Keyring(config.api_keys, config.api_key_file)
        self._serving: bool | None = None
        self._server = grpc.aio.server(
            handlers=[_handlers(service, methods, around) for service, methods in descriptors.items()],
            interceptors=[_RequireKey(keys)] if keys else [],
            options=[
                ("grpc.max_receive_message_length", config.max_request_bytes),
                ("grpc.so_reuseport", int(config.shares_port)),
            ],
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        listed = [*self._names[1:], health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(listed, self._server, pool=schema().pool)

    async def start(self) -> None:
        """Listen. Raises UserError when the address is taken or the certificate can't be read."""
        address = f"{bracketed(self._config.host)}:{self._config.port}"
        try:
            if self._config.tls_cert:
                self._server.add_secure_port(address, _credentials(self._config))
            else:
                self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise UserError(f"can't serve gRPC on {address}: {error}") from error
        await self.set_serving(False)
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        """What health checks hear."""
        if serving is self._serving:
            return
        self._serving = serving
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, and end those that run after `grace_s`."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _credentials(config: RpcConfig) -> grpc.ServerCredentials:
    try:
        key, certificate = Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes()
    except OSError as error:
        raise UserError(f"the gRPC certificate can't be read: {error}") from error
    return grpc.ssl_server_credentials([(key, certificate)])


def _handlers(service: ServiceDescriptor, implementation: object, around: Around) -> grpc.GenericRpcHandler:
    methods = {}
    for method in service.methods:
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        call = _guarded(getattr(implementation, _snake(method.name)), request, around)
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        methods[method.name] = make(call, None, response.SerializeToString)
    return grpc.method_handlers_generic_handler(service.full_name, methods)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _guarded(method: Method, kind: type[Message], around: Around) -> Method:
    """`method` for a request of this kind as it came, in bytes."""

    async def call(data: bytes, context: Context) -> Any:
        try:
            with around():
                return await method(_read(data, kind), context)
        except CallError as error:
            failure = error
        except Exception:
            log.exception("a gRPC call failed")
            failure = CallError(grpc.StatusCode.INTERNAL, "internal error; the server's log has the details")
        return await context.abort(failure.code, str(failure), failure.trailing)

    return call


def _read(data: bytes, kind: type[Message]) -> Message:
    try:
        return kind.FromString(data)
    except DecodeError as error:  # INTERNAL is the guide's code for it
        raise CallError(grpc.StatusCode.INTERNAL, f"the request is no {kind.DESCRIPTOR.full_name}: {error}") from error


class _RequireKey(grpc.aio.ServerInterceptor):
    """A bearer key on everything but health checks."""

    def __init__(self, keys: Keyring) -> None:
        self._keys = keys

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], details: Any) -> Any:
        if details.method.startswith(HEALTH):
            return await continuation(details)
        authorization = str(dict(details.invocation_metadata).get("authorization", "")).encode()
        name = self._keys.name_of(bearer_key(authorization))
        if name is None:
            return grpc.unary_unary_rpc_method_handler(_refuse)
        key_name.set(name)
        return await continuation(details)


async def _refuse(_request: bytes, context: Context) -> None:
    text = "a valid API key is needed in the metadata: authorization: Bearer KEY"
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, text)

"""The frontend's process: HTTP in front, the cluster behind.

python -m baton.frontend.main --config frontend.json

After SIGTERM it answers new requests and /ready with 503 and lets running ones finish for shutdown_timeout_s; what runs
then is ended with an error that says so, and it listens no more.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from baton.frontend.api.embeddings import Embedder
from baton.frontend.api.generation import Generator
from baton.frontend.api.prompts import Prompts
from baton.frontend.chat_template import load_chat_template
from baton.frontend.engine_client import EngineClient
from baton.frontend.forward import peer_socket
from baton.frontend.http_protocol import protocol_factory
from baton.frontend.http_server import build_app
from baton.frontend.in_flight import InFlight
from baton.frontend.model_info import ModelInfo, load_model_info
from baton.frontend.pooling import load_pooling_info
from baton.frontend.structured.grammars import Grammars
from baton.frontend.tokenizer import load_tokenizer
from baton.frontend.tools.plan import ToolServing
from baton.proto.config import FrontendConfig
from baton.proto.errors import UserError
from baton.proto.supervision import Supervised, run_child

log = logging.getLogger(__name__)

BACKLOG = 2048
FLUSH_S = 2.0
"""After the last request has been ended: how long its answer may take to be written."""
CLOSE_ACK_S = 1.0
"""How long the scheduler may take to hear of the last ends."""


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: the launcher's SIGTERM arrives through stop_fd."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main(config: FrontendConfig, supervised: Supervised) -> int:
    """The whole life of the process."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its steps of stopping are not news
    listener = _listen(config)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, supervised, listener))
    finally:
        listener.close()
        _remove_socket(config.uds)
    return 0


def _remove_socket(path: str) -> None:
    """Nothing but a socket: the path is a user's."""
    if path and Path(path).is_socket():
        Path(path).unlink(missing_ok=True)


async def _serve(config: FrontendConfig, supervised: Supervised, listener: socket.socket) -> None:
    tokenizer = load_tokenizer(config.model)
    info = load_model_info(config.model, tokenizer)
    pooling = load_pooling_info(config.model.path, config.pooler)
    tools = ToolServing(config, tokenizer)
    prompts = Prompts(tokenizer, load_chat_template(config.model, tokenizer), info)
    client = EngineClient(config)
    grammars = Grammars(tokenizer, info)
    generator = Generator(client, prompts, grammars, tools, info, config.max_logprobs)
    embedder = Embedder(client, prompts, info, pooling)
    requests = InFlight()
    app = requests.of(build_app(config, client, prompts, info, generator, embedder))
    server = _Server(
        uvicorn.Config(
            app,
            ssl_keyfile=config.tls.keyfile or None,
            ssl_certfile=config.tls.certfile or None,
            ssl_ca_certs=config.tls.ca_certs or None,
            ssl_cert_reqs=config.tls.cert_reqs,
            **_common(config),
        )
    )
    try:
        inference = _inference(config, client, prompts, info, generator, embedder, requests)
        async with inference, _for_peers(config, app):
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            await _until_stopped(client, supervised, serving)
            generator.draining = embedder.draining = True
            await _drain(client, requests, config.shutdown_timeout_s)
            server.should_exit = True
            await _stop(client, serving)
    finally:
        prompts.close()
        grammars.close()
        client.close()


def _common(config: FrontendConfig) -> dict[str, Any]:
    """uvicorn's settings of everything that this process serves."""
    return {
        "http": protocol_factory(config),
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_graceful_shutdown": round(config.shutdown_timeout_s + FLUSH_S),
    }


@contextlib.asynccontextmanager
async def _for_peers(config: FrontendConfig, app: Any) -> AsyncIterator[None]:
    """The same for the other frontends, which hand on what only this one can answer (forward.py)."""
    if not config.peers:
        yield
        return
    path = peer_socket(config.run_dir, config.name)
    _remove_socket(str(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        server = _Server(uvicorn.Config(app, **_common(config)))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await _ended(serving)
            _remove_socket(str(path))


@contextlib.asynccontextmanager
async def _inference(
    config: FrontendConfig,
    client: EngineClient,
    prompts: Prompts,
    info: ModelInfo,
    generator: Generator,
    embedder: Embedder,
    requests: InFlight,
) -> AsyncIterator[None]:
    """The gRPC server, where one is wanted: the core installation has no gRPC."""
    if not config.grpc.port:
        yield
        return
    from baton.frontend.rpc_server import InferenceServer

    server = InferenceServer(config, client, prompts, info, generator, embedder, requests)
    await server.start()
    try:
        yield
    finally:
        await server.stop(FLUSH_S)


async def _until_stopped(client: EngineClient, supervised: Supervised, serving: "asyncio.Task[None]") -> None:
    """Serve until SIGTERM; report readiness when it comes. Raises what the server died of."""
    stopped = asyncio.Event()
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(supervised.stop_fd, stopped.set)

    def look() -> None:
        if client.ready and not ready.is_set():
            ready.set()
            supervised.ready()

    client.on_status(look)
    waiting = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
            raise RuntimeError("the HTTP server has ended by itself")
    finally:
        waiting.cancel()
        loop.remove_reader(supervised.stop_fd)


async def _drain(client: EngineClient, requests: InFlight, timeout_s: float) -> None:
    """Let requests finish; then end them. Background responses have streams alone."""
    if count := max(client.num_streams, len(requests)):
        log.info("%d requests may finish within %.0f s", count, timeout_s)
    try:
        async with asyncio.timeout(timeout_s):
            await requests.all_ended()
            await client.all_ended()
    except TimeoutError:
        log.warning("%d requests are ended unfinished", max(client.num_streams, len(requests)))
        client.abort_all("the server is shutting down; the answer is incomplete")


async def _stop(client: EngineClient, serving: "asyncio.Task[None]") -> None:
    """Let the last answers be written and the scheduler hear of the last ends."""
    await asyncio.wait({serving}, timeout=FLUSH_S)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_ACK_S):
            await client.all_closed()
    await _ended(serving, 0.0)


async def _ended(serving: "asyncio.Task[None]", patience_s: float = FLUSH_S) -> None:
    """Wait until a server that has been told to exit has, or make it."""
    await asyncio.wait({serving}, timeout=patience_s)
    if not serving.done():
        serving.cancel()
        await asyncio.wait({serving})


def _listen(config: FrontendConfig) -> socket.socket:
    """The bound socket. Raises UserError when the address is taken or can't be used."""
    try:
        if config.uds:
            _remove_socket(config.uds)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(config.uds)
        else:
            family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, config.shares_port)
            listener.bind(address)
    except OSError as error:
        where = config.uds or f"{config.host}:{config.port}"
        raise UserError(f"can't serve on {where}: {error.strerror}; choose another address") from error
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


if __name__ == "__main__":
    run_child(main, FrontendConfig)

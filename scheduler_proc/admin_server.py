"""The Admin service: a gRPC server in a thread of its own, which asks the scheduler's loop and writes down the answers.

Nothing here decides anything: operations.py does.
"""

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
from msgspec.structs import asdict

from baton.proto.config import RpcConfig
from baton.proto.lifecycle import Duty
from baton.proto.rpc.schema import schema
from baton.proto.rpc.server import CallError, Context, RpcServer
from baton.scheduler_proc.desk import Desk, Subscription
from baton.scheduler_proc.instructions import Happened
from baton.scheduler_proc.operations import Operator, RefusedError
from baton.scheduler_proc.registry import Registry, Worker
from baton.scheduler_proc.stream import Leg, State, Stream

T = TypeVar("T")

STOP_GRACE_S = 0.5
DEFAULT_LIMIT = 1000
"""Requests listed at most when the caller does not say."""

_STATES = {
    State.QUEUED: "QUEUED",
    State.PREFILLING: "PREFILLING",
    State.HANDOFF: "HANDOFF",
    State.DECODING: "DECODING",
    State.RECOVERING: "RECOVERING",
    State.CLAIMED: "RECOVERING",
    State.ENDED: "ENDED",
}


class AdminServer:
    """Owns the thread; close() ends it."""

    def __init__(self, config: RpcConfig, desk: Desk) -> None:
        """Returns once it listens. Raises UserError when it can't."""
        self._config = config
        self._desk = desk
        self._started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="admin", daemon=True)
        self._thread.start()
        self._loop = self._started.result()

    def close(self) -> None:
        """Running calls get STOP_GRACE_S."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self) -> None:
        server = RpcServer(self._config, {"Admin": Admin(self._desk)})
        await server.start()
        await server.set_serving(True)
        self._started.set_result(asyncio.get_running_loop())
        await self._stopped.wait()
        await server.stop(STOP_GRACE_S)


class Admin:
    """The RPCs."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._messages = _Messages()

    async def list_workers(self, _request: Any, _context: Context) -> Any:
        def look(operator: Operator, now: float) -> Any:
            reason = operator.not_ready_because()
            workers = [self._messages.worker(worker, now) for worker in operator.registry.workers.values()]
            return self._messages.new("ListWorkersResponse", workers=workers, ready=not reason, not_ready_reason=reason)

        return await self._ask(look)

    async def drain(self, request: Any, _context: Context) -> Any:
        told = await self._told(lambda o, now: o.drain(request.name, request.move_streams, now))
        if not request.wait:
            return told
        state = self._messages.worker_states["DRAINED"]
        return await self._ask(self._worker(lambda o, _: o.draining(request.name)), lambda it: it.state == state)

    async def resume(self, request: Any, _context: Context) -> Any:
        return await self._told(lambda operator, _: operator.resume(request.name))

    async def remove(self, request: Any, _context: Context) -> Any:
        leaving = await self._ask(lambda operator, _: operator.remove(request.name, request.force))
        await self._ask(lambda operator, _: leaving.identity in operator.registry.workers, lambda there: not there)
        return self._messages.new("RemoveResponse")

    async def set_role(self, request: Any, _context: Context) -> Any:
        role = self._messages.role_names.get(request.role, "")
        return await self._told(lambda operator, _: operator.set_role(request.name, role))

    async def list_requests(self, request: Any, _context: Context) -> Any:
        def look(operator: Operator, now: float) -> Any:
            streams = operator.requests(request.worker)
            listed = streams[: request.limit or DEFAULT_LIMIT]
            requests = [self._messages.request(stream, operator.registry, now) for stream in listed]
            return self._messages.new("ListRequestsResponse", requests=requests, total=len(streams))

        if request.limit < 0:
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, f"limit must not be negative, got {request.limit}")
        return await self._ask(look)

    async def cancel(self, request: Any, _context: Context) -> Any:
        await self._ask(lambda operator, now: operator.cancel(request.id, now))
        return self._messages.new("CancelResponse")

    async def flush_prefix_caches(self, request: Any, _context: Context) -> Any:
        workers = await self._ask(lambda operator, _: operator.flush(request.worker))
        await self._ask(lambda operator, _: operator.obeyed(workers), bool)
        return self._messages.new("FlushPrefixCachesResponse", workers=[worker.name for worker in workers])

    async def set_log_level(self, request: Any, _context: Context) -> Any:
        names = await self._ask(lambda operator, _: operator.set_log_level(request.level.lower(), request.process))
        return self._messages.new("SetLogLevelResponse", processes=names)

    async def list_links(self, request: Any, _context: Context) -> Any:
        links = await self._ask(lambda operator, _: operator.links(request.worker))
        new = self._messages.new
        return new("ListLinksResponse", links=[new("KvLink", reader=reader, **asdict(it)) for reader, it in links])

    async def watch_events(self, _request: Any, context: Context) -> None:
        with Subscription(self._desk) as subscription:
            await context.send_initial_metadata(())
            while True:
                try:
                    event = await subscription.next()
                except OverflowError:
                    raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, "events were read too slowly") from None
                await context.write(self._messages.event(event))

    async def _told(self, tell: Callable[[Operator, float], Worker]) -> Any:
        """A worker as it is once it has obeyed an order, or as it was when it left instead."""
        worker = await self._ask(tell)
        await self._ask(lambda operator, _: operator.obeyed([worker]), bool)
        return await self._ask(self._worker(lambda _operator, _now: worker))

    def _worker(self, ask: Callable[[Operator, float], Worker]) -> Callable[[Operator, float], Any]:
        """As a message, made where the worker does not change meanwhile."""
        return lambda operator, now: self._messages.worker(ask(operator, now), now)

    async def _ask(self, ask: Callable[[Operator, float], T], until: Callable[[T], bool] | None = None) -> T:
        try:
            return await self._desk.ask(ask, until)
        except RefusedError as refusal:
            raise CallError(grpc.StatusCode[refusal.why], str(refusal)) from refusal


class _Messages:
    """What the cluster knows, as messages of admin.proto."""

    def __init__(self) -> None:
        enum = schema().enum
        self.worker_states, self._request_states = enum("WorkerState"), enum("RequestState")
        self._kinds, self._roles = enum("EventKind"), enum("Role")
        self.role_names = {number: name.lower() for name, number in self._roles.items()}

    def new(self, message: str, /, **fields: Any) -> Any:
        return schema().message(message)(**fields)

    def worker(self, worker: Worker, now: float) -> Any:
        load, hello = worker.load, worker.hello
        return self.new(
            "Worker",
            name=worker.name,
            role=self._roles[worker.role.upper()],
            state=self.worker_states[_state(worker)],
            incarnation=hello.incarnation,
            pid=hello.pid,
            num_blocks=hello.num_blocks,
            used_blocks=load.used_blocks if load else 0,
            free_blocks=max(worker.free_blocks, 0),
            block_size=hello.block_size,
            running=load.running if load else 0,
            waiting=load.waiting if load else 0,
            queued_tokens=worker.outstanding_tokens,
            leases=load.leases if load else 0,
            streams=len(worker.streams),
            member_seconds=now - worker.joined_at,
            generated_tokens=load.generated_tokens if load else 0,
            host=hello.host,
        )

    def request(self, stream: Stream, registry: Registry, now: float) -> Any:
        frontend = registry.frontends.get(stream.frontend)
        return self.new(
            "Request",
            id=stream.id,
            state=self._request_states[_STATES[stream.state]],
            frontend=frontend.hello.name if frontend else "",
            prompt_tokens=stream.prompt_len,
            priority=stream.priority,
            attempt=stream.attempt,
            age_seconds=now - stream.arrived,
            prefill_worker=_name(stream.prefill, registry),
            decode_worker=_name(stream.decode, registry),
            request_id=stream.request,
        )

    def event(self, event: Happened) -> Any:
        kind = self._kinds[event.kind]
        return self.new("Event", kind=kind, subject=event.subject, text=event.text, unix_seconds=time.time())


def _state(worker: Worker) -> str:
    if worker.settings.duty == Duty.DRAINING and worker.idle:
        return "DRAINED"
    return worker.settings.duty.upper()


def _name(leg: Leg | None, registry: Registry) -> str:
    worker = registry.workers.get(leg.worker) if leg is not None else None
    return worker.name if worker is not None else ""

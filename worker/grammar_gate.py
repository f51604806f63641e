"""Streams whose grammar is being compiled: they enter no step before it is, so that no step ever waits for a compiler.

    ask ─► Compile ─► (a thread) ─► Compiled ─► whoever waits at the gate is admitted
    enter: at once when the answer has come, else State.COMPILING

Asking happens when the request arrives, entering when it could run: a decode leg pulls its KV meanwhile. The grammar is
kept until the request is over, since it may leave its slot and come back.
"""

from collections.abc import Callable

from baton.worker.effects import Compile, Compiled, Effect, Release
from baton.worker.request import Request, State


class GrammarGate:
    """Requests without an answer yet, by grammar."""

    def __init__(self, outbox: list[Effect]) -> None:
        self._outbox = outbox
        self._asked: dict[str, list[Request]] = {}
        self._waiting: dict[Request, Callable[[Request], None]] = {}
        self._holders: set[Request] = set()
        """Requests whose grammar is kept for them."""

    def __len__(self) -> int:
        """Requests that could run if their grammar were there."""
        return len(self._waiting)

    def ask(self, request: Request) -> None:
        """Have the request's grammar compiled, if it has one."""
        if grammar := request.params.grammar:
            self._asked.setdefault(grammar, []).append(request)
            self._holders.add(request)
            self._outbox.append(Compile(grammar))

    def enter(self, request: Request, admit: Callable[[Request], None]) -> None:
        """Admit the request now or when its grammar is compiled."""
        if request in self._asked.get(request.params.grammar, ()):
            request.state = State.COMPILING
            self._waiting[request] = admit
        else:
            admit(request)

    def answer(self, event: Compiled) -> list[Request]:
        """Admit who waits for this grammar. When it can't be compiled: the requests that can't run."""
        asked = self._asked.pop(event.grammar, [])
        waiting = [(request, self._waiting.pop(request)) for request in asked if request in self._waiting]
        if event.error:
            return asked
        for request, admit in waiting:
            admit(request)
        return []

    def forget(self, request: Request) -> None:
        """The request is over."""
        self._waiting.pop(request, None)
        asked = self._asked.get(request.params.grammar, [])
        if request in asked:
            asked.remove(request)
        if request in self._holders:
            self._holders.remove(request)
            self._outbox.append(Release(request.params.grammar))

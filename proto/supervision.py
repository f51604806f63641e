"""How a process is started by the launcher and tells it how it is: the child's side of supervision.

    spawned ─► alive ─► ready ─► (SIGTERM: stopping) ─► exit 0
     │   └───────┴────────┴─► failed: one-line summary to the launcher, traceback on stderr, exit 1 (2: UserError)
     └─► standing by, with all its code imported ─► alive: the process whose place it takes has died

A child gets `--config FILE` (its config struct as JSON) and `--supervisor-fd N`, its end of a socketpair to the
launcher. Without the descriptor it was started by hand and reports to nobody. A supervised child can't outlive its
launcher: the kernel kills it when its parent dies. With `--standby` it waits for one packet, BEGIN.
"""

import argparse
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec
from setproctitle import setproctitle

from baton.proto import config as config_tree
from baton.proto.config import FrontendConfig, KeeperConfig, SchedulerConfig, WorkerConfig
from baton.proto.errors import UserError

GC_THRESHOLD = 10_000
"""Objects more than before, until the garbage collector looks for cycles among them; a step of a thousand streams makes
several thousand that live for milliseconds."""
SWITCH_INTERVAL_S = 0.5e-3
"""How long a thread may keep a process's loop waiting for the interpreter: one that tokenises, or enqueues copies."""
BEGIN = b"begin"
"""Launcher to a child that stands by."""
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
_PR_SET_PDEATHSIG = 1

ConfigT = TypeVar("ConfigT", WorkerConfig, FrontendConfig, SchedulerConfig, KeeperConfig)


class Report(msgspec.Struct, frozen=True):
    """Child to launcher, one packet of JSON each."""

    event: str
    """standing by (it waits to begin) | alive (the process runs) | ready (it can serve) | leaving (it ends for good) |
    failed (it is about to exit)."""
    error: str = ""
    """For failed: the exception in one line."""
    user_error: bool = False
    """For failed: a UserError, so trying again can't help."""


class Supervised:
    """A process's end of its supervision: reports upwards, stop requests downwards."""

    def __init__(self, launcher: socket.socket | None) -> None:
        self._launcher = launcher
        self._stopping = False
        self._ready = False
        self.stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable, and never read, from the first SIGTERM on: give it to a poller or to loop.add_reader."""
        signal.signal(signal.SIGTERM, self._on_stop)
        # Ctrl-C reaches the whole terminal group; a supervised child waits for its launcher to drain it.
        signal.signal(signal.SIGINT, signal.SIG_IGN if launcher else self._on_stop)

    @property
    def stopping(self) -> bool:
        """Whether SIGTERM has arrived: finish what runs, take nothing new, return from main."""
        return self._stopping

    @property
    def by_hand(self) -> bool:
        """Whether no launcher listens: what the user should read goes to stderr then."""
        return self._launcher is None

    def stand_by(self, prepare: Callable[[], object]) -> None:
        """Prepare, then wait until the launcher wants this process to begin, or is gone. A SIGTERM meanwhile is not for
        this process, which has nothing to stop: the launcher kills it."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        prepare()
        self._send(Report("standing by"))
        if self._launcher is not None and self._launcher.recv(len(BEGIN)) != BEGIN:
            sys.exit(0)
        signal.signal(signal.SIGTERM, self._on_stop)

    def alive(self) -> None:
        """The process runs; run_child says so before main."""
        self._send(Report("alive"))

    def ready(self) -> None:
        """The process can do its work. What it has loaded for that stays: the garbage collector leaves it alone."""
        if not self._ready:
            self._ready = True
            gc.collect()
            gc.freeze()
            gc.set_threshold(GC_THRESHOLD)
        self._send(Report("ready"))

    def leaving(self) -> None:
        """The process ends because an operator wants it gone: it is not to be started again."""
        self._send(Report("leaving"))

    def failed(self, error: BaseException) -> None:
        """The process is about to exit because of `error`."""
        self._send(Report("failed", summary(error), isinstance(error, UserError)))

    def _on_stop(self, _signum: int, _frame: object) -> None:
        self._stopping = True
        os.eventfd_write(self.stop_fd, 1)

    def _send(self, report: Report) -> None:
        if self._launcher is None:
            return
        try:
            self._launcher.send(msgspec.json.encode(report), socket.MSG_NOSIGNAL)
        except OSError:
            logging.getLogger(__name__).warning("the launcher does not take reports; not sent: %s", report)


def summary(error: BaseException) -> str:
    """An exception in one line, as the last line of its traceback would say it."""
    if isinstance(error, UserError):
        return str(error)
    return " ".join("".join(traceback.format_exception_only(error)).split())


def run_child(
    main: Callable[[ConfigT, Supervised], int],
    kind: type[ConfigT],
    prepare: Callable[[ConfigT], object] = lambda config: None,
) -> NoReturn:
    """Run `main(config, supervised)` as this process and exit with what it returns. `prepare` does what can be done in
    advance while standing by.

    The config's name becomes the process title and the prefix of its log lines. uvicorn and others install their own
    SIGTERM handlers: keep them from it, or stop_fd stays silent.
    """
    arguments = _parse_arguments()
    supervised = Supervised(_tie_to_launcher(arguments.supervisor_fd))
    try:
        config = config_tree.decode(arguments.config.read_bytes(), kind)
        if arguments.standby:
            setproctitle(f"baton: {config.name}-standby")
            supervised.stand_by(lambda: prepare(config))
        name_process(config.name)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        supervised.alive()
        code = main(config, supervised)
    except Exception as error:
        code = _report_failure(supervised, error)
    sys.exit(code)


def report_early_failure(error: Exception) -> int:
    """Tell the launcher about an exception from before run_child; the exit code."""
    return _report_failure(Supervised(_tie_to_launcher(_parse_arguments().supervisor_fd)), error)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A process of Baton; `baton serve` starts it.")
    parser.add_argument("--config", type=Path, required=True, help="JSON file with the process's configuration")
    parser.add_argument("--supervisor-fd", type=int, default=-1, help="socket to the launcher; none when by hand")
    parser.add_argument("--standby", action="store_true", help="import everything, then wait for the launcher")
    return parser.parse_args()


def _tie_to_launcher(fd: int) -> socket.socket | None:
    """Die when the launcher does, however it dies, and take its socket over. None when started by hand."""
    if fd < 0:
        return None
    launcher = socket.socket(fileno=fd)
    launcher.set_inheritable(False)
    die_with_parent()
    # A launcher that died before the prctl is never noticed by the kernel's signal, but its end of the pair is closed.
    try:
        orphaned = launcher.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        orphaned = False
    if orphaned:
        os._exit(EXIT_FAILED)
    return launcher


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def name_process(name: str) -> None:
    """Title, log prefix, and a traceback if it crashes."""
    setproctitle(f"baton: {name}")
    _set_up_logging(name)
    faulthandler.enable()


def set_log_level(level: str) -> None:
    """debug | info | warning | error; empty: as at the start."""
    logging.getLogger().setLevel(level.upper() or logging.INFO)


def _set_up_logging(name: str) -> None:
    """One line per record on stderr, with the process's name."""
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s %(levelname)s [{name}] %(message)s", datefmt="%H:%M:%S", force=True
    )


def _report_failure(supervised: Supervised, error: Exception) -> int:
    supervised.failed(error)
    if isinstance(error, UserError):
        if supervised.by_hand:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    traceback.print_exception(error)
    return EXIT_FAILED

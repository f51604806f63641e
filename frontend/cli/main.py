"""The `baton` command. A subcommand is a module with add_arguments(parser) and run(args) -> exit code."""

import argparse
import importlib
import os
import signal
import sys
from typing import Any, NamedTuple

from baton.proto import __version__
from baton.proto.errors import UserError


class Command(NamedTuple):
    """A subcommand, imported only when it is called."""

    module: str
    summary: str


COMMANDS = {
    "serve": Command("baton.frontend.cli.serve", "serve a model over HTTP with separate prefill and decode workers"),
    "worker": Command("baton.frontend.cli.worker", "start one more worker for a running `baton serve`"),
    "keys new": Command("baton.frontend.cli.keys_new", "make the key of a deployment that spans hosts"),
    "ctl": Command("baton.frontend.cli.ctl", "look at a running deployment and change it: drain, remove, cancel, …"),
    "generate": Command("baton.frontend.cli.generate", "complete prompts in one process, without a server"),
    "bench serve": Command("baton.frontend.cli.bench_serve", "measure throughput and latency of a running server"),
    "bench throughput": Command("baton.frontend.cli.bench_throughput", "measure how fast one process gets work done"),
    "bench latency": Command("baton.frontend.cli.bench_latency", "measure how long one batch takes"),
}

USAGE = "\n".join(
    [
        "usage: baton COMMAND …",
        "",
        *(f"  baton {name:<16} {command.summary}" for name, command in COMMANDS.items()),
        "",
        "  baton COMMAND --help   a command's options",
        "  baton --version",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 2 for what the user can mend, with one line that says how."""
    words = sys.argv[1:] if argv is None else argv
    if words in (["--version"], ["-V"]):
        print(f"baton {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    for length in (1, 2):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return _run(name, words[length:])
    print(f"error: no command 'baton {words[0]}'; commands are {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


def _run(name: str, words: list[str]) -> int:
    module = importlib.import_module(COMMANDS[name].module)
    parser = OneLineParser(prog=f"baton {name}", description=module.__doc__)
    try:
        module.add_arguments(parser)
        return module.run(parser.parse(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `baton … | head`; what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and that takes defaults from a YAML file when it has --config."""

    def __init__(self, prog: str, description: str | None, **options: Any) -> None:
        """`options` are ArgumentParser's, which a subcommand's parser gets too."""
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> None:  # type: ignore[override]
        """argparse prints the whole usage first; the one line that matters is enough."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse(self, words: list[str]) -> argparse.Namespace:
        """The command line wins over the file that --config names."""
        if "--config" not in self._option_string_actions:
            return self.parse_args(words)
        from baton.frontend.cli import config_file

        return config_file.parse(self, words)


if __name__ == "__main__":
    sys.exit(main())

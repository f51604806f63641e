"""The MPS daemon of a shared GPU, alive as long as its keeper, which is no client of it: it would wait for itself."""

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Self

from baton.proto import mps
from baton.proto.errors import UserError
from baton.proto.supervision import die_with_parent

START_S = 10.0
LOOK_AGAIN_S = 0.05
"""The daemon says nothing when it is ready: it has to be asked."""


class MpsDaemon:
    """Started on entry and ended on exit. Raises UserError when it does not come up."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def __enter__(self) -> Self:
        shutil.rmtree(self._directory, ignore_errors=True)  # of a keeper that was killed
        Path(self._directory).mkdir(mode=0o700)
        environment = {**os.environ, **mps.environment(self._directory)}
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # clients have it: indices would be taken twice
        try:
            self._process = subprocess.Popen(
                [mps.CONTROL, "-f"], stdin=subprocess.DEVNULL, env=environment, preexec_fn=die_with_parent
            )
        except OSError as error:
            raise UserError(f"--mps: {mps.CONTROL} can't be started: {error.strerror}") from error
        deadline = time.monotonic() + START_S
        while mps.ask(self._directory, "get_server_list") is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise UserError(
                    f"--mps: {mps.CONTROL} does not serve here; leave --mps out, the GPU is shared in turns"
                )
            time.sleep(LOOK_AGAIN_S)
        return self

    def __exit__(self, *_: object) -> None:
        mps.ask(self._directory, "quit")
        try:
            self._process.wait(mps.ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

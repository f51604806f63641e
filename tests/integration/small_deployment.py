"""Runs the real launcher over supervised_child.py processes: `small_deployment.py NAME=BEHAVIOUR[+][:ENDS_WITH] …`.

With + another process stands by.
"""

import asyncio
import sys
from pathlib import Path

from baton.frontend.launcher import Launcher
from baton.frontend.processes import ProcessSpec, StopOrder
from baton.frontend.run_dir import RunDir
from baton.proto.config import SchedulerConfig
from baton.proto.supervision import name_process

CHILD = str(Path(__file__).with_name("supervised_child.py"))
ORDER = {
    "frontend": StopOrder.FRONTEND,
    "worker": StopOrder.WORKER,
    "scheduler": StopOrder.SCHEDULER,
    "keeper": StopOrder.KEEPER,
}


def main() -> int:
    """Exit code of the launcher."""
    name_process("launcher")
    with RunDir() as run_dir:
        specs = []
        for argument in sys.argv[1:]:
            name, _, behaviour = argument.partition("=")
            behaviour, _, ends_with = behaviour.partition(":")
            standby, behaviour = behaviour.endswith("+"), behaviour.removesuffix("+")
            config = SchedulerConfig(name=name, endpoint=f"{run_dir.path}/{name}.starts")
            command = ("-m", "baton.proto.child", "no_such_module") if behaviour == "missing" else (CHILD,)
            environment = {"BEHAVIOUR": behaviour}
            specs.append(ProcessSpec(config, command, ORDER[name], environment, ends_with=ends_with, standby=standby))
        print(f"run_dir {run_dir.path}", flush=True)
        launcher = Launcher(specs, run_dir.path, lambda _: print("ready", flush=True), drain_s=1.0)
        return asyncio.run(launcher.run())


if __name__ == "__main__":
    sys.exit(main())

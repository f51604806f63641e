"""Run one seed of the fault simulation and print every message, fault and decision of it.

python tests/faults/replay.py SEED --depth DEPTH [--shared]
"""

import argparse

from sim.scenario import Scenario


def main() -> None:
    """An AssertionError at the end says what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--depth", type=int, default=1, help="steps in flight at each worker")
    parser.add_argument("--shared", action="store_true", help="all workers in one pool")
    arguments = parser.parse_args()
    print(Scenario(arguments.seed, arguments.depth, arguments.shared, trace=print).run())


if __name__ == "__main__":
    main()

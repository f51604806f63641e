"""How the launcher runs a module: `python -m baton.proto.child MODULE --config FILE --supervisor-fd N`.

The module calls run_child; what fails before, such as an import, is told to the launcher in the same way.
"""

import runpy
import sys

from baton.proto.supervision import die_with_parent, report_early_failure


def main() -> None:
    """Run the module named by the first argument as __main__."""
    die_with_parent()
    module = sys.argv.pop(1)
    try:
        runpy.run_module(module, run_name="__main__")
    except Exception as error:
        sys.exit(report_early_failure(error))


if __name__ == "__main__":
    main()

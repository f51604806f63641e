"""Makes the simulated cluster importable as `sim` (tests run in importlib mode and are no packages)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

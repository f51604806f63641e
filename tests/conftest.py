"""Settings that must be there before any test module is imported."""

import os

import pytest

# Read when torch loads. With the default, threads that wait spin, and everything else on a shared core starves.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

pytest.register_assert_rewrite("support.transport_suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of single tests."""
    parser.addoption("--kills", type=int, default=3, help="workers that test_kills.py kills, one after the other")

"""The folders keep to what they may import, and every package is in the wheel."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "proto": set(),
    "frontend": {"proto"},
    "scheduler_proc": {"proto"},
    "worker": {"proto", "kv_transfer", "kernels"},
    "keeper": {"proto", "kv_transfer"},
    "kv_transfer": {"proto", "kernels"},
    "kernels": set(),
}
WITHOUT_TORCH = ("proto", "frontend", "scheduler_proc", "keeper")


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions; relative ones with their leading dots."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module if module != "baton" else f"baton.{node.names[0].name}"


def sources(part: str) -> list[Path]:
    files = sorted((ROOT / part).rglob("*.py"))
    assert files, f"{part} has no modules"
    return files


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    present = [
        "baton." + ".".join(file.parent.relative_to(ROOT).parts)
        for part in MAY_IMPORT
        for file in (ROOT / part).rglob("__init__.py")
    ]
    assert sorted(listed) == sorted(present)


def test_every_module_lies_in_a_package() -> None:
    orphans = [file for part in MAY_IMPORT for file in sources(part) if not (file.parent / "__init__.py").exists()]
    assert orphans == []


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_folder_imports_only_what_it_may(part: str) -> None:
    allowed = MAY_IMPORT[part] | {part}
    wrong = [
        f"{file.relative_to(ROOT)}: {module}"
        for file in sources(part)
        for module in imports(file)
        if module.split(".")[0] == "baton" and module.split(".")[1] not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_are_absolute_and_within_baton(part: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}: {module}"
        for file in sources(part)
        for module in imports(file)
        if module.startswith(".") or module.split(".")[0] in MAY_IMPORT
    ]
    assert wrong == []


@pytest.mark.parametrize("part", WITHOUT_TORCH)
def test_processes_without_a_model_do_not_import_torch(part: str) -> None:
    wrong = [str(file) for file in sources(part) if any(name.split(".")[0] == "torch" for name in imports(file))]
    assert wrong == []

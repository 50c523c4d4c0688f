"""Which part of the package may import which, and what importing it loads."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpc_dl

PACKAGE = Path(hpc_dl.__file__).parent
JOBS = PACKAGE.parent / "jobs"

CORE = {"errors", "spec", "arrays", "compress", "comm", "reduce", "world"}

#: room -> what it may import; a name with a dot allows that module of a room and no other.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "spec": {"errors"},
    "arrays": {"errors"},
    "comm": {"errors", "spec", "arrays"},
    "compress": {"errors", "spec", "arrays"},
    "reduce": {"errors", "arrays", "compress", "comm"},
    "world": {"errors", "arrays", "compress", "comm", "reduce"},
    "torch": CORE,
    "tensorflow": CORE,
    "keras": CORE | {"torch", "tensorflow"},
    "data": {"errors"},
    "observe": {"errors"},
    "models": set(),
    "training": {"errors", "data", "observe", "models", "world", "torch", "keras"},
    "launch": {"errors", "comm.abort", "comm.choose", "comm.launched"},
    "cli": {"errors", "arrays", "launch", "comm", "compress", "reduce"},
    "testing": CORE | {"torch", "tensorflow", "keras", "data", "observe", "launch"},
    "jobs": {"errors", "data", "observe", "models", "training", "cli", "world", "torch", "keras"},
}
#: Horovod calls its Keras adapter by two names; the second is this folder, and holds nothing.
ALIASES = set((PACKAGE / "tensorflow" / "keras").glob("*.py"))

FRAMEWORKS = ("torch", "tensorflow", "keras", "mpi4py", "horovod", "numba")


def _files() -> Iterator[tuple[str, Path]]:
    """Yield (room, file) for all of the package and the jobs."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py" and path not in ALIASES:
            yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path
    for path in sorted(JOBS.glob("*.py")):
        yield "jobs", path


def _imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module below hpc_dl) for every import in a file, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name of the module"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, module = name.partition(".")
            if package == "hpc_dl" and not module.startswith("__"):
                yield node.lineno, module


def test_every_room_is_in_the_table() -> None:
    assert {room for room, _ in _files()} == set(ALLOWED)


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {
            room
            for room, allowed in ALLOWED.items()
            if room not in done and {name.partition(".")[0] for name in allowed} <= done
        }
        assert ready, f"a cycle among {sorted(set(ALLOWED) - done)}"
        done |= ready


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_only_what_the_table_allows(room: str) -> None:
    allowed = ALLOWED[room] | {room}
    for owner, path in _files():
        if owner != room:
            continue
        for line, module in _imported(path):
            parts = module.split(".")
            assert parts[0] in allowed or ".".join(parts[:2]) in allowed, (
                f"{path}:{line}: {room} imports hpc_dl.{module}; allowed: {sorted(allowed)}"
            )


def _loaded(statement: str) -> set[str]:
    """Run a statement in a fresh interpreter and return the frameworks that it loaded."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return {name.partition(".")[0] for name in json.loads(run.stdout.splitlines()[-1])}


def test_importing_the_package_loads_no_framework_and_not_even_numpy() -> None:
    assert not _loaded("import hpc_dl") & {*FRAMEWORKS, "numpy"}


def test_importing_the_rooms_of_the_core_loads_no_framework() -> None:
    rooms = ("arrays", "comm", "reduce", "world", "launch", "cli", "data", "observe", "testing")
    statement = "; ".join(f"import hpc_dl.{room}" for room in rooms)
    assert not _loaded(statement) & set(FRAMEWORKS)


def test_data_and_observe_do_not_need_the_communicators() -> None:
    for room in ("data", "observe"):
        code = f"import hpc_dl.{room}, sys; assert 'hpc_dl.comm' not in sys.modules"
        assert "numpy" in _loaded(code)

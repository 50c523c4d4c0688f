"""Run the tests of tests/parallel on real ranks: one launch for each size and communicator.

    python tests/run_parallel.py --sizes 1,2,3 --comm mpi,horovod
    python tests/run_parallel.py --sizes 2 --comm mpi tests/parallel/test_torch_optimizer.py -k adam

Without a path the files of each framework get launches of their own, as a process starts one
world; those of Keras one for each of its backends. What is not an option of this program goes
to pytest.
"""

import argparse
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_dl.errors import HpcDlError
from hpc_dl.launch.request import Request, launch

HERE = Path(__file__).resolve().parent
FRAMEWORKS = ("torch", "tensorflow", "keras")
KERAS_BACKENDS = ("tensorflow", "torch")

#: Exit code of pytest when nothing was selected, as a `-k` may do to one group.
NOTHING_SELECTED = 5
#: Exit codes of a launch that the user or the system ended: the next must not begin.
ENDED = tuple(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))


@dataclass(frozen=True)
class Group:
    """Test files that share a process."""

    name: str
    paths: tuple[str, ...]
    keras_backend: str = ""
    """For KERAS_BACKEND, which a process reads once; empty: as it is set."""


def groups(folder: Path) -> list[Group]:
    """Sort the test files by the framework in their name; ``other`` for those without."""
    sorted_files: dict[str, list[str]] = {}
    for path in sorted(folder.glob("test_*.py")):
        words = path.stem.split("_")
        framework = next((word for word in words if word in FRAMEWORKS), "other")
        sorted_files.setdefault(framework, []).append(str(path))
    keras = tuple(sorted_files.pop("keras", ()))
    on_keras = [Group(f"keras on {name}", keras, name) for name in KERAS_BACKENDS if keras]
    return [*(Group(name, tuple(paths)) for name, paths in sorted_files.items()), *on_keras]


def run(title: str, group: Group, size: int, comm: str, timeout: float, options: list[str]) -> int:
    """Run one group on so many ranks; return the exit code."""
    print(f"== {title}", flush=True)
    start = time.monotonic()
    request = Request(
        script="pytest",
        # Ranks share the cache folder and would write it at the same time.
        arguments=["-q", "-p", "no:cacheprovider", *options, *group.paths],
        ranks=size,
        module=True,
        timeout=timeout,
        environment={"HPC_DL_COMM": comm, **_backend(group)},
    )
    code = launch(request, sys.stdout.buffer, sys.stderr.buffer).code
    said = {0: "passed", NOTHING_SELECTED: "nothing was selected"}
    state = said.get(code, f"FAILED with exit code {code}")
    print(f"== {title}: {state} in {time.monotonic() - start:.1f} s\n", flush=True)
    return code


def _backend(group: Group) -> dict[str, str]:
    return {"KERAS_BACKEND": group.keras_backend} if group.keras_backend else {}


def main(arguments: list[str]) -> int:
    """Run all that was asked for, and return the exit code."""
    # No abbreviations: an option of pytest's may begin like one of these.
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        usage="%(prog)s [options] [PATH ...] [options of pytest]",
        allow_abbrev=False,
    )
    parser.add_argument("--sizes", default="1,2,3", help="numbers of ranks (default: %(default)s)")
    parser.add_argument("--comm", default="mpi", help="communicators (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each launch")
    # Pytest's own, named here as their values would else be taken for paths.
    parser.add_argument("-k", metavar="EXPRESSION", help="run tests whose name fits")
    parser.add_argument("-m", metavar="EXPRESSION", help="run tests whose marks fit")
    options, rest = parser.parse_known_args(arguments)
    paths = tuple(word for word in rest if not word.startswith("-"))
    for path in paths:
        if not Path(path.partition("::")[0]).exists():
            parser.error(f"there is no {path!r}; write the value of an option as --option=value")
    selection = [*_given("-k", options.k), *_given("-m", options.m)]
    pytest_options = [*selection, *(word for word in rest if word.startswith("-"))]
    chosen = [Group("named", paths)] if paths else groups(HERE / "parallel")
    launches = [
        (group, size, comm)
        for comm in options.comm.split(",")
        for size in map(int, options.sizes.split(","))
        for group in chosen
    ]
    codes: dict[str, int] = {}
    for group, size, comm in launches:
        title = f"{group.name}, {size} rank{'s' if size > 1 else ''}, {comm}"
        codes[title] = run(title, group, size, comm, options.timeout, pytest_options)
        if codes[title] in ENDED:
            print(f"ended by a signal; {len(launches) - len(codes)} launches were not begun")
            return codes[title]
    return summary(codes, selective=bool(selection))


def _given(option: str, value: str | None) -> list[str]:
    return [] if value is None else [option, value]


def summary(codes: Mapping[str, int], *, selective: bool) -> int:
    """Print which launches failed, and return the exit code.

    Args:
        codes: the exit code of each launch.
        selective: a launch may have nothing to run, as tests were chosen by name or mark.
    """
    fine = (0, NOTHING_SELECTED) if selective else (0,)
    failed = [title for title, code in codes.items() if code not in fine]
    print(f"{len(codes) - len(failed)} of {len(codes)} launches passed")
    for title in failed:
        print(f"failed: {title}")
    if failed:
        return 1
    if all(code == NOTHING_SELECTED for code in codes.values()):
        print("no test was selected")
        return NOTHING_SELECTED
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except HpcDlError as error:
        sys.exit(f"Error: {error}")

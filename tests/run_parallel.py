"""Run the tests of tests/parallel on real ranks: one launch for each size and communicator.

    python tests/run_parallel.py --sizes 1,2,3 --comm mpi,horovod
    python tests/run_parallel.py --sizes 2 --comm mpi tests/parallel/test_torch_optimizer.py -k adam

Without a path the files of each framework get launches of their own, as a process starts one
world; those of Keras one for each of its backends. What is not an option of this program goes
to pytest.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from hpc_dl.errors import HpcDlError
from hpc_dl.launch.request import Request, launch

HERE = Path(__file__).resolve().parent
FRAMEWORKS = ("torch", "tensorflow", "keras")
KERAS_BACKENDS = ("tensorflow", "torch")

#: Exit code of pytest when nothing was selected, as a `-k` may do to one group.
NOTHING_SELECTED = 5


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
        word = path.stem.split("_")[1]
        sorted_files.setdefault(word if word in FRAMEWORKS else "other", []).append(str(path))
    keras = tuple(sorted_files.pop("keras", ()))
    on_keras = [Group(f"keras on {name}", keras, name) for name in KERAS_BACKENDS if keras]
    return [*(Group(name, tuple(paths)) for name, paths in sorted_files.items()), *on_keras]


def run(group: Group, size: int, comm: str, timeout: float, options: list[str]) -> bool:
    """Run one group on so many ranks; tell whether it passed."""
    title = f"{group.name}, {size} rank{'s' if size > 1 else ''}, {comm}"
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
    passed = code in (0, NOTHING_SELECTED)
    state = "passed" if passed else f"FAILED with exit code {code}"
    print(f"== {title}: {state} in {time.monotonic() - start:.1f} s\n", flush=True)
    return passed


def _backend(group: Group) -> dict[str, str]:
    return {"KERAS_BACKEND": group.keras_backend} if group.keras_backend else {}


def main(arguments: list[str]) -> int:
    """Run all that was asked for, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="1,2,3", help="numbers of ranks (default: %(default)s)")
    parser.add_argument("--comm", default="mpi", help="communicators (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each launch")
    options, rest = parser.parse_known_args(arguments)
    named = tuple(word for word in rest if Path(word.partition("::")[0]).exists())
    pytest_options = [word for word in rest if word not in named]
    chosen = [Group("named", named)] if named else groups(HERE / "parallel")
    results = {
        (group.name, size, comm): run(group, size, comm, options.timeout, pytest_options)
        for comm in options.comm.split(",")
        for size in map(int, options.sizes.split(","))
        for group in chosen
    }
    failed = [", ".join(map(str, key)) for key, passed in results.items() if not passed]
    if not results:
        print(f"no tests in {HERE / 'parallel'}")
        return 1
    print(f"{len(results) - len(failed)} of {len(results)} launches passed")
    for key in failed:
        print(f"failed: {key}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except HpcDlError as error:
        sys.exit(f"Error: {error}")

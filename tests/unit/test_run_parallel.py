"""The runner of the parallel tests: nothing that did not run counts as passed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import run_parallel

from hpc_dl.launch.request import Request
from hpc_dl.launch.verdict import Verdict

HERE = str(Path(__file__))


class Launches:
    """Take the place of `launch`: note the requests, and answer with exit codes in turn."""

    def __init__(self, codes: Iterator[int]) -> None:
        self.codes = codes
        self.requests: list[Request] = []

    def __call__(self, request: Request, *_: object) -> Verdict:
        self.requests.append(request)
        return Verdict(next(self.codes))

    def pytest_arguments(self) -> list[str]:
        own = ["-q", "-p", "no:cacheprovider"]
        assert list(self.requests[-1].arguments)[:3] == own
        return list(self.requests[-1].arguments)[3:]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Launches:
    codes = getattr(request, "param", [0] * 100)
    made = Launches(iter(codes))
    monkeypatch.setattr(run_parallel, "launch", made)
    return made


ONE = ["--sizes", "1", "--comm", "mpi"]


@pytest.mark.parametrize("launches", [[130], [0, 143, 0], [129]], indirect=True)
def test_an_ending_signal_ends_the_run(launches: Launches) -> None:
    """Ctrl-C reaches the launch; the next one must not begin."""
    code = run_parallel.main(["--sizes", "1,2,3,4", HERE])
    assert code in (129, 130, 143)
    assert len(launches.requests) == (2 if code == 143 else 1)


@pytest.mark.parametrize("launches", [[137, 1, 0]], indirect=True)
def test_other_failures_do_not(launches: Launches) -> None:
    """Signal 9 is what a rank out of memory gets: the other launches still tell something."""
    assert run_parallel.main(["--sizes", "1,2,3", HERE]) == 1
    assert len(launches.requests) == 3


@pytest.mark.parametrize(
    ("launches", "options", "code"),
    [
        ([5, 0], ["-k", "adam"], 0),
        ([5, 0], ["-m", "slow"], 0),
        ([5, 0], ["-kadam"], 0),
        ([5, 5], ["-k", "adam"], 5),
        ([5, 0], [], 1),
        ([5, 0], ["-x"], 1),
        ([0, 0], [], 0),
        ([1, 5], ["-k", "adam"], 1),
    ],
    indirect=["launches"],
)
def test_a_launch_without_tests_passes_only_if_it_was_asked_for(
    launches: Launches, options: list[str], code: int
) -> None:
    assert run_parallel.main(["--sizes", "1,2", HERE, *options]) == code


@pytest.mark.parametrize(
    ("words", "passed_on"),
    [
        ([HERE], [HERE]),
        (["-k", "adam", HERE], ["-k", "adam", HERE]),
        ([HERE, "-k", "adam"], ["-k", "adam", HERE]),
        ([HERE + "::test_x", "-x"], ["-x", HERE + "::test_x"]),
        (["-x", HERE], ["-x", HERE]),
        (["--maxfail=1", HERE], ["--maxfail=1", HERE]),
        # A word after -k is never a path, though there be a folder of that name.
        (["-k", "tests", HERE], ["-k", "tests", HERE]),
        (["-m", "not slow", HERE], ["-m", "not slow", HERE]),
        # No short forms: --time is not --timeout.
        (["--time=3", HERE], ["--time=3", HERE]),
    ],
)
def test_words_go_to_pytest(launches: Launches, words: list[str], passed_on: list[str]) -> None:
    assert run_parallel.main([*ONE, *words]) == 0
    assert launches.pytest_arguments() == passed_on
    assert len(launches.requests) == 1


def test_without_a_path_every_framework_is_run(launches: Launches) -> None:
    assert run_parallel.main([*ONE, "-k", "tests"]) == 0
    run = {Path(word).name for request in launches.requests for word in request.arguments}
    there = {path.name for path in (Path(HERE).parents[1] / "parallel").glob("test_*.py")}
    assert there <= run
    assert len(launches.requests) >= 4


@pytest.mark.parametrize("word", ["no/such/test.py", "1"])
def test_a_path_that_is_not_there_is_an_error(
    launches: Launches, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_parallel.main([*ONE, "--maxfail", word])
    assert caught.value.code == 2
    assert repr(word) in capsys.readouterr().err
    assert launches.requests == []


def test_a_framework_is_found_anywhere_in_a_name(tmp_path: Path) -> None:
    """Two frameworks never share a process, and Keras has its backends one after the other."""
    names = ("world", "torch_optimizer", "compression_torch", "compression_keras", "tensorflow_x")
    for name in names:
        (tmp_path / f"test_{name}.py").touch()
    found = {
        (group.name, group.keras_backend): [Path(path).stem for path in group.paths]
        for group in run_parallel.groups(tmp_path)
    }
    assert found == {
        ("other", ""): ["test_world"],
        ("torch", ""): ["test_compression_torch", "test_torch_optimizer"],
        ("tensorflow", ""): ["test_tensorflow_x"],
        ("keras on tensorflow", "tensorflow"): ["test_compression_keras"],
        ("keras on torch", "torch"): ["test_compression_keras"],
    }

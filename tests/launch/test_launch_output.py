"""What ranks print arrives whole, in order, on the right stream, under the right rank."""

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import PATIENCE, Launch, command

SIZES = (1, 2, 3)


@pytest.mark.parametrize("ranks", SIZES)
def test_every_rank_runs_the_script_with_its_arguments(launch: Launch, ranks: int) -> None:
    done = launch("print(sys.argv[1:], __name__)", "--lr=0.1", "two words", ranks=ranks)
    assert done.code == 0, done.err
    said = "['--lr=0.1', 'two words'] __main__"
    expected = [f"[{rank}] {said}" for rank in range(ranks)] if ranks > 1 else [said]
    assert sorted(done.out.splitlines()) == expected


def test_lines_stay_whole_and_in_order(launch: Launch) -> None:
    count, ranks = 2000, 3
    done = launch(f"for i in range({count}): print(i, 'x' * (i % 500), RANK)", ranks=ranks)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert len(lines) == count * ranks
    for rank in range(ranks):
        mark = f"[{rank}] "
        mine = [line.removeprefix(mark) for line in lines if line.startswith(mark)]
        assert mine == [f"{i} {'x' * (i % 500)} {rank}" for i in range(count)]


def test_streams_are_kept_apart(launch: Launch) -> None:
    done = launch("print('to out'); print('to err', file=sys.stderr)")
    assert sorted(done.out.splitlines()) == ["[0] to out", "[1] to out"]
    assert sorted(done.err.splitlines()) == ["[0] to err", "[1] to err"]


def test_streams_that_end_in_one_file_keep_their_order(write: Callable[[str], Path]) -> None:
    script = write(
        "for i in range(200): print(2 * i); print(2 * i + 1, file=sys.stderr, flush=True)"
    )
    done = subprocess.run(
        command("-n", 2, script),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    for rank in range(2):
        mine = [line for line in done.stdout.splitlines() if line.startswith(f"[{rank}] ")]
        assert mine == [f"[{rank}] {i}" for i in range(400)]


def test_output_of_child_processes_and_of_c_code_has_the_prefix_too(launch: Launch) -> None:
    done = launch("import subprocess; os.write(1, b'raw\\n'); subprocess.run(['echo', 'child'])")
    assert sorted(done.out.splitlines()) == ["[0] child", "[0] raw", "[1] child", "[1] raw"]


def test_no_prefix_on_request_and_the_last_line_needs_no_end(launch: Launch) -> None:
    done = launch("print('hello', end='')", options=("--no-prefix",))
    assert done.out == "hello\nhello\n"


def test_a_progress_bar_leaves_one_line_in_a_log(launch: Launch) -> None:
    done = launch("for i in range(50): print(f'\\r{i}%', end='', flush=True)\nprint()")
    assert sorted(done.out.splitlines()) == ["[0] 49%", "[1] 49%"]


def test_modules_run_as_of_python_m(tmp_path: Path) -> None:
    package = tmp_path / "my_project"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text("import sys; print(__name__, __package__, sys.argv[1:])")
    done = subprocess.run(
        command("-n", 2, "-m", "my_project.train", "-x"),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "[1] __main__ my_project ['-x']\n" in done.stdout


def test_a_script_finds_the_modules_beside_it(launch: Launch, write: Callable[..., Path]) -> None:
    write("NAME = 'beside'", "neighbour.py")
    done = launch("import neighbour; print(neighbour.NAME, __file__ == sys.argv[0])")
    assert sorted(done.out.splitlines()) == ["[0] beside True", "[1] beside True"]


def test_variables_reach_every_rank(launch: Launch) -> None:
    done = launch("print(os.environ['COLOUR'])", options=("--env", "COLOUR=blue = green"))
    assert sorted(done.out.splitlines()) == ["[0] blue = green", "[1] blue = green"]


def on_a_terminal(*arguments: object) -> tuple[int, bytes]:
    """Run a command on a pseudo terminal; return its exit code and what the screen received."""
    pid, screen = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*arguments])  # type: ignore[list-item]
    seen, deadline = b"", time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            seen += os.read(screen, 1 << 16)
        except OSError:  # the other side has closed
            break
    os.close(screen)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen


def test_rank_0_has_the_terminal(write: Callable[[str], Path]) -> None:
    script = write(
        "print('tty', RANK, sys.stdout.isatty())\n"
        "if RANK == 0:\n"
        "    for i in range(3): print(f'\\rbar {i}', end='', flush=True); time.sleep(0.1)\n"
        "    print()"
    )
    code, seen = on_a_terminal(*command("-n", 2, script))
    assert code == 0, seen
    assert b"tty 0 True\r\n" in seen
    assert b"[1] \x1b[0mtty 1 False\r\n" in seen
    assert all(b"\rbar %d" % i in seen for i in range(3))
    assert re.search(rb"bar 2\s*\r\n", seen)


def test_colour_goes_to_terminals_only(write: Callable[[str], Path], tmp_path: Path) -> None:
    script, log = write("print('out'); print('err', file=sys.stderr)"), tmp_path / "log"
    redirected = (
        f"import os; os.dup2(os.open({str(log)!r}, os.O_WRONLY | os.O_CREAT), 2); "
        f"os.execv({sys.executable!r}, {command('-n', 2, script)!r})"
    )
    code, seen = on_a_terminal(sys.executable, "-c", redirected)
    assert code == 0, seen
    assert b"[1] \x1b[0mout\r\n" in seen
    assert sorted(log.read_text().splitlines()) == ["[0] err", "[1] err"]


def test_no_color_is_heeded(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    code, seen = on_a_terminal(*command("-n", 2, write("print('out')")))
    assert code == 0, seen
    assert b"[1] out\r\n" in seen

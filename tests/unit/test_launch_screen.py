"""Many ranks on one screen: whole lines, in each rank's order, and an unharmed progress bar."""

import io
import itertools

from hypothesis import given
from hypothesis import strategies as st

from hpc_dl.launch.screen import LONGEST_LINE, LineSplitter, Screen, visible


def screen(
    *, terminal: bool = False, prefix: bool = True, colour: tuple[bool, bool] = (False, False)
) -> tuple[Screen, io.BytesIO, io.BytesIO]:
    out, err = io.BytesIO(), io.BytesIO()
    return Screen(out, err, prefix=prefix, colour=colour, terminal=terminal), out, err


@given(
    text=st.binary(max_size=200).map(lambda text: text.replace(b"\r", b"")),
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
def test_lines_do_not_depend_on_how_the_stream_was_cut(text: bytes, cuts: list[int]) -> None:
    splitter = LineSplitter()
    edges = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    lines = []
    for start, end in itertools.pairwise(edges):
        lines += splitter.feed(text[start:end])
    expected = text.split(b"\n")
    assert lines + splitter.close() == expected[: None if expected[-1] else -1]


def test_a_line_without_end_is_cut_in_the_end() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"x" * (LONGEST_LINE + 1)) == [b"x" * (LONGEST_LINE + 1)]
    assert splitter.close() == []


def test_of_a_redrawn_line_the_last_state_is_kept() -> None:
    assert visible(b"10%\r20%\r30%\r") == b"30%"
    assert visible(b"windows line\r") == b"windows line"


def test_each_line_begins_with_its_rank() -> None:
    shown, out, err = screen()
    shown.line(b"hello", 3)
    shown.line(b"oh", 1, error=True)
    shown.line(b"hpc-dl launch: done", error=True)
    assert out.getvalue() == b"[3] hello\n"
    assert err.getvalue() == b"[1] oh\nhpc-dl launch: done\n"


def test_a_prefix_is_coloured_where_it_is_seen() -> None:
    shown, out, err = screen(colour=(True, False))
    shown.line(b"hello", 0)
    shown.line(b"oh", 0, error=True)
    assert out.getvalue() == b"\x1b[36m[0] \x1b[0mhello\n"
    assert err.getvalue() == b"[0] oh\n"


def test_no_prefix_means_none() -> None:
    shown, out, _ = screen(prefix=False)
    shown.line(b"hello", 3)
    assert out.getvalue() == b"hello\n"


def test_a_line_of_another_rank_goes_above_the_bar_of_rank_0() -> None:
    shown, out, _ = screen(terminal=True)
    shown.draw(b"epoch 1 done\n\r[#    ]\r[##   ]")
    shown.line(b"warning", 1)
    shown.settle()
    shown.draw(b"\r[###  ]")
    assert out.getvalue() == (
        b"epoch 1 done\n\r[#    ]\r[##   ]\r\x1b[2K[1] warning\n[##   ]\r[###  ]"
    )


def test_a_line_of_another_rank_waits_for_the_line_of_rank_0() -> None:
    shown, out, err = screen(terminal=True)
    shown.draw(b"epoch 1")
    shown.line(b"one", 1)
    shown.line(b"two", 2, error=True)
    shown.draw(b" done\n")
    shown.line(b"three", 1)
    assert out.getvalue() == b"epoch 1 done\n[1] one\n[1] three\n"
    assert err.getvalue() == b"[2] two\n"


def test_a_question_of_rank_0_is_not_wiped_away() -> None:
    shown, out, _ = screen(terminal=True)
    shown.draw(b"Continue? ")
    shown.line(b"one", 1)
    shown.settle()
    assert out.getvalue() == b"Continue? \r\x1b[2K[1] one\nContinue? "


def test_finished_lines_of_rank_0_are_left_alone() -> None:
    shown, out, _ = screen(terminal=True)
    shown.draw(b"epoch 1 done\n")
    shown.line(b"me too", 1)
    assert out.getvalue() == b"epoch 1 done\n[1] me too\n"


def test_a_bar_that_was_cut_off_leaves_a_usable_terminal() -> None:
    shown, out, _ = screen(terminal=True)
    shown.draw(b"\x1b[?25lepoch 1 [###")
    shown.restore()
    assert out.getvalue().endswith(b"[###\x1b[?25h\n")

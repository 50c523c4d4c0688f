"""What a run leaves behind can be relied on."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_dl.errors import DataError, OptionError
from hpc_dl.observe import (
    MetricsWriter,
    curve,
    git_commit,
    make_run_folder,
    read_metrics,
    versions,
    weights_digest,
    write_summary,
)
from hpc_dl.observe.values import plain

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(JSON)
def test_plain_values_are_strict_json(value: object) -> None:
    text = json.dumps(plain(value), allow_nan=False)
    assert plain(json.loads(text)) == plain(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        (float("-inf"), None),
        (np.float32(0.5), 0.5),
        (np.float32("nan"), None),
        (np.array([[3]]), 3),
        (np.array(2, ml_dtypes.bfloat16), 2.0),
        (np.bool_(True), True),
        (Path("a/b"), "a/b"),
        ({"x": (1, float("nan"))}, {"x": [1, None]}),
    ],
)
def test_plain_takes_what_training_code_has(value: object, expected: object) -> None:
    assert plain(value) == expected


def test_plain_takes_tensors_that_need_gradients() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    assert plain(torch.tensor([0.25], requires_grad=True)) == 0.25


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [1, object()]}, r"value\.a\[1\] is object"),
        (np.zeros(3), r"an array of shape \(3,\)"),
        (b"x", "value is bytes"),
    ],
)
def test_plain_names_what_it_cannot_take(value: object, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        plain(value)


def test_metrics_are_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        metrics.write({"epoch": 1, "loss": float("nan")})
        assert len(path.read_text().splitlines()) == 1  # there at once, not at the end
        metrics.write({"epoch": 2, "loss": np.float32(0.5)})
    assert read_metrics(path) == [{"epoch": 1, "loss": None}, {"epoch": 2, "loss": 0.5}]


def test_a_bad_value_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        with pytest.raises(OptionError):
            metrics.write({"good": 1, "bad": object()})
        metrics.write({"good": 2})
    assert read_metrics(path) == [{"good": 2}]


@given(whole=st.integers(0, 6), torn=st.integers(0, 12000))
def test_a_torn_line_is_cut_off(
    whole: int, torn: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    kept = "".join(f'{{"epoch": {i}}}\n' for i in range(whole))
    path.write_text(kept + "x" * torn)
    assert len(read_metrics(path)) == whole
    with MetricsWriter(path) as metrics:
        metrics.write({"epoch": whole})
    assert path.read_text() == kept + f'{{"epoch": {whole}}}\n'


def test_lines_survive_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    script = (
        "import os, signal, sys\n"
        "from hpc_dl.observe import MetricsWriter\n"
        "metrics = MetricsWriter(sys.argv[1])\n"
        "for i in range(20): metrics.write({'i': i})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [record["i"] for record in read_metrics(path)] == list(range(20))


@pytest.mark.parametrize(("line", "said"), [("{", "line 2: no JSON"), ("[1]", "a JSON object")])
def test_a_damaged_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"epoch": 1}}\n{line}\n')
    with pytest.raises(DataError, match=said):
        read_metrics(path)


def test_metrics_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened to append"):
        MetricsWriter(tmp_path / "nothing" / "metrics.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_summary_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, {"test_accuracy": 0.5, "bytes_sent": None})
    with pytest.raises(OptionError):
        write_summary(path, {"test_accuracy": object()})
    assert json.loads(path.read_text()) == {"test_accuracy": 0.5, "bytes_sent": None}
    write_summary(path, {"test_accuracy": float("inf")})
    assert json.loads(path.read_text()) == {"test_accuracy": None}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_summary_may_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_summary(tmp_path / "summary.json", {})
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "summary.json").stat().st_mode & 0o777 == 0o640


def test_a_failed_replacement_keeps_the_old_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, {"run": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        write_summary(path, {"run": 2})
    assert json.loads(path.read_text()) == {"run": 1}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_digest_is_of_the_bytes_in_order() -> None:
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.array(7, np.int64)
    expected = hashlib.sha256(a.tobytes() + b.tobytes()).hexdigest()
    assert weights_digest([("a", a), ("b", b)]) == expected
    assert weights_digest([("b", b), ("a", a)]) != expected
    assert weights_digest([("a", np.asfortranarray(a)), ("b", b)]) == expected
    assert weights_digest([]) == hashlib.sha256().hexdigest()


def test_a_curve_is_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    records = [
        {"epoch": 1, "loss": 2.0, "accuracy": 0.1, "test_loss": None},
        {"epoch": 2, "loss": None, "accuracy": 0.6, "test_loss": 1.0},
    ]
    curve(records, tmp_path / "curve.png", "a run")
    curve([], tmp_path / "empty.png")
    for name in ("curve", "empty"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size == (1500, 630)
    with Image.open(tmp_path / "curve.png") as drawn, Image.open(tmp_path / "empty.png") as empty:
        assert len(drawn.convert("RGB").getcolors(1 << 20) or ()) > len(
            empty.convert("RGB").getcolors(1 << 20) or ()
        )


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    script = (
        "import sys; from hpc_dl.observe import curve; curve([], sys.argv[1]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "c.png"], timeout=60, check=True)


def test_run_folders_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [make_run_folder(None, "job") for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() and folder.name.startswith("job-2") for folder in folders)
    assert make_run_folder(tmp_path / "a" / "b", "job") == tmp_path / "a" / "b"
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
def test_a_run_does_not_overwrite_another(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(OptionError, match=f"holds the {name} of an earlier run"):
        make_run_folder(tmp_path, "job")


def test_a_run_folder_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="cannot make the run folder runs/job-"):
        make_run_folder(None, "job")
    with pytest.raises(OptionError, match="cannot make the run folder"):
        make_run_folder(tmp_path / "runs" / "mine", "job")


def test_a_run_folder_without_permission_is_refused() -> None:
    with pytest.raises(OptionError, match="the run folder /proc"):
        make_run_folder("/proc/self/fd", "job")


def test_versions_are_of_what_is_loaded() -> None:
    script = (
        "from hpc_dl.observe import versions; before = versions(); import sklearn; "
        "assert set(before) == {'python', 'hpc_dl', 'numpy'}, before; "
        "assert versions()['sklearn'] == sklearn.__version__"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)
    assert versions()["numpy"] == np.__version__


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *identity, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def test_git_commit_says_where_a_script_comes_from(tmp_path: Path) -> None:
    script = tmp_path / "my job.py"
    script.touch()
    git(tmp_path, "init", "-q")
    assert git_commit(script) is None  # not tracked
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(script) == head
    script.write_text("changed")
    assert git_commit(script) == f"{head}-dirty"
    outsider = tmp_path / "venv" / "job.py"
    outsider.parent.mkdir()
    outsider.touch()
    assert git_commit(outsider) is None

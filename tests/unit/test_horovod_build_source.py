"""The carried patches fit the published source exactly, and nothing else is accepted."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from hpc_dl.errors import BuildError
from hpc_dl.launch import horovod_source, wheel_cache
from hpc_dl.launch.horovod_source import Patch, apply_patch, apply_patches, fetch, patches, unpack


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Horovod's source: the one that a build has kept, else fetched."""
    kept = wheel_cache.default_folder({}) / horovod_source.ARCHIVE
    try:
        return fetch(kept.parent if kept.is_file() else tmp_path_factory.mktemp("source"))
    except BuildError as error:
        pytest.skip(f"Horovod's source cannot be had here: {error}")


def test_every_patch_fits_and_says_why(archive: Path, tmp_path: Path) -> None:
    source = unpack(archive, tmp_path)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    apply_patches(source)
    after = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    assert before.keys() == after.keys()
    changed = {str(p.relative_to(source)) for p in before if before[p] != after[p]}
    named = {
        line.removeprefix(b"+++ b/").decode()
        for patch in patches()
        for line in patch.diff.splitlines()
        if line.startswith(b"+++ ")
    }
    assert changed == named
    assert all(len(patch.why) > 20 for patch in patches())


def test_the_patched_source_asks_for_what_this_year_needs(archive: Path, tmp_path: Path) -> None:
    source = unpack(archive, tmp_path)
    apply_patches(source)
    python = [*source.glob("setup.py"), *source.glob("horovod/runner/*.py")]
    assert not any("distutils" in path.read_text() for path in python)
    for path in (source / "CMakeLists.txt", source / "horovod/torch/CMakeLists.txt"):
        assert "CMAKE_CXX_STANDARD 14" not in path.read_text()
    for path in (source / "horovod/runner/js_run.py", source / "horovod/torch/optimizer.py"):
        subprocess.run([sys.executable, "-m", "py_compile", path], check=True, timeout=60)


def test_patches_cannot_be_applied_twice(archive: Path, tmp_path: Path) -> None:
    source = unpack(archive, tmp_path)
    apply_patches(source)
    with pytest.raises(BuildError, match=patches()[0].name):
        apply_patches(source)


DIFF = b"--- a/file.txt\n+++ b/file.txt\n@@ -1,3 +1,3 @@\n one\n-two\n+TWO\n three\n"


@pytest.mark.parametrize(
    "text",
    ["one\ntwo\nTHREE\n", "zero\none\ntwo\nthree\n", "one\nTWO\nthree\n", ""],
    ids=["other context", "other place", "already done", "empty"],
)
def test_a_patch_that_does_not_fit_exactly_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.txt").write_text(text)
    with pytest.raises(BuildError, match=r"99-test\.patch does not fit"):
        apply_patch(Patch("99-test.patch", "a test", DIFF), tmp_path)
    assert (tmp_path / "file.txt").read_text() == text


def test_a_patch_for_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"99-test\.patch"):
        apply_patch(Patch("99-test.patch", "a test", DIFF), tmp_path)


def test_a_patch_that_fits_is_applied(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("one\ntwo\nthree\n")
    apply_patch(Patch("99-test.patch", "a test", DIFF), tmp_path)
    assert (tmp_path / "file.txt").read_text() == "one\nTWO\nthree\n"


def test_another_archive_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / horovod_source.ARCHIVE
    wrong.write_bytes(b"something else")
    with pytest.raises(BuildError, match=horovod_source.SHA256):
        fetch(tmp_path / "cache", wrong)
    with pytest.raises(BuildError, match="cannot read"):
        fetch(tmp_path / "cache", tmp_path / "missing.tar.gz")


def test_the_first_releases_of_python_3_11_unpack_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no filters."""
    monkeypatch.delattr(tarfile, "data_filter", raising=False)

    def extractall(self: tarfile.TarFile, path: Path) -> None:
        (path / "unpacked").touch()

    monkeypatch.setattr(tarfile.TarFile, "extractall", extractall)
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz"):
        pass
    unpack(tmp_path / "archive.tar.gz", tmp_path)
    assert (tmp_path / "unpacked").exists()


@pytest.mark.parametrize("filters", [True, False])
@pytest.mark.parametrize("kind", ["name", "link"])
def test_an_archive_cannot_write_outside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, filters: bool
) -> None:
    if not filters:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    evil = tmp_path / "evil.tar.gz"
    (tmp_path / "payload").write_text("x")
    with tarfile.open(evil, "w:gz") as tar:
        if kind == "link":
            link = tarfile.TarInfo("a")
            link.type, link.linkname = tarfile.SYMTYPE, ".."
            tar.addfile(link)
        tar.add(tmp_path / "payload", arcname="a/escaped" if kind == "link" else "../escaped")
    (tmp_path / "in").mkdir()
    with pytest.raises(BuildError, match="cannot unpack"):
        unpack(evil, tmp_path / "in")
    assert not (tmp_path / "escaped").exists()

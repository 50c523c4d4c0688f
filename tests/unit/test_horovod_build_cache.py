"""A cached wheel is used exactly when everything that it depends on is the same."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_dl.launch import wheel_cache
from hpc_dl.launch.wheel_cache import METADATA, Key

KEY = Key(
    horovod="0.28.1",
    patches="abc",
    python="cp311",
    machine="x86_64-avx",
    torch="2.13.0+cpu",
    tensorflow="2.21.0",
    mpi="mpirun (Open MPI) 5.0.11 (environment)",
    gpu="none",
    cuda=None,
)

_words = st.text("abc.+123", max_size=4)
_keys = st.builds(
    Key,
    **{
        field.name: st.none() | _words if "None" in str(field.type) else _words
        for field in dataclasses.fields(Key)
    },
)


@given(_keys, _keys)
def test_keys_share_a_name_only_if_they_are_equal(one: Key, other: Key) -> None:
    assert (one.digest == other.digest) == (one == other)
    assert (one.name == other.name) == (one == other)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Key)])
def test_a_change_in_any_part_is_another_wheel(tmp_path: Path, field: str) -> None:
    store(tmp_path)
    assert wheel_cache.find(tmp_path, KEY) is not None
    other = dataclasses.replace(KEY, **{field: "changed"})
    assert wheel_cache.find(tmp_path, other) is None


def store(folder: Path, content: bytes = b"a wheel") -> wheel_cache.CachedWheel:
    built = folder / "scratch" / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
    built.parent.mkdir(exist_ok=True)
    built.write_bytes(content)
    return wheel_cache.store(folder, KEY, built, 12.5)


def test_a_wheel_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    stored = store(tmp_path)
    found = wheel_cache.find(tmp_path, KEY)
    assert found == stored
    assert found.path.read_bytes() == b"a wheel"
    assert wheel_cache.contents(tmp_path) == [stored]


def test_storing_again_replaces(tmp_path: Path) -> None:
    store(tmp_path)
    store(tmp_path, b"a better wheel")
    found = wheel_cache.find(tmp_path, KEY)
    assert found is not None
    assert found.path.read_bytes() == b"a better wheel"
    leftovers = [path.name for path in found.path.parent.iterdir() if path.name.startswith(".hor")]
    assert leftovers == []


@pytest.mark.parametrize(
    "damage", ["cut", "changed", "no wheel", "no metadata", "half metadata", "other metadata"]
)
def test_a_damaged_wheel_is_not_used(tmp_path: Path, damage: str) -> None:
    wheel = store(tmp_path).path
    metadata = wheel.parent / METADATA
    match damage:
        case "cut":
            wheel.write_bytes(b"a whe")
        case "changed":
            wheel.write_bytes(b"a wheeL")
        case "no wheel":
            wheel.unlink()
        case "no metadata":
            metadata.unlink()
        case "half metadata":
            metadata.write_text(metadata.read_text()[:40])
        case "other metadata":
            metadata.write_text(json.dumps({"key": {"torch": "1"}, "wheel": wheel.name}))
    assert wheel_cache.find(tmp_path, KEY) is None
    assert wheel_cache.contents(tmp_path) == []
    store(tmp_path)
    assert wheel_cache.find(tmp_path, KEY) is not None


def test_metadata_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    wheel = store(tmp_path).path
    outside = tmp_path / "outside.whl"
    outside.write_bytes(b"a wheel")
    metadata = wheel.parent / METADATA
    data = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({**data, "wheel": "../outside.whl"}))
    assert wheel_cache.find(tmp_path, KEY) is None


def test_the_default_folder_follows_xdg(tmp_path: Path) -> None:
    assert wheel_cache.default_folder({"XDG_CACHE_HOME": "/a b"}) == Path("/a b/hpc_dl/wheels")
    assert wheel_cache.default_folder({}) == Path.home() / ".cache/hpc_dl/wheels"


def test_a_cache_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with (
        pytest.raises(wheel_cache.BuildError, match="--wheel-dir"),
        wheel_cache.locked(blocked, KEY, "waiting"),
    ):
        pass

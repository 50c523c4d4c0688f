"""What is in the source tree is there after an installation."""

import configparser
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from hpc_dl import __version__

ROOT = Path(__file__).parents[2]

#: Package -> folder, where these differ from hpc_dl.NAME -> hpc_dl/NAME.
MAPPED = {"hpc_dl.jobs": "jobs", "hpc_dl.slurm": "slurm"}


def declared(section: str, key: str) -> list[str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser[section][key].split()


def test_every_package_is_declared() -> None:
    found = [path.parent.relative_to(ROOT) for path in ROOT.glob("hpc_dl/**/__init__.py")]
    assert declared("options", "packages") == sorted(
        [*(".".join(path.parts) for path in found), *MAPPED]
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what a distribution is made of into a folder with a space."""
    copy = tmp_path_factory.mktemp("a source")
    for name in ("hpc_dl", "jobs", "slurm"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def pip(*arguments: str | Path) -> None:
    for needed, least in (("pip", "21"), ("setuptools", "77"), ("wheel", "0.40")):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed, so no wheel can be built offline")
        if Version(importlib.metadata.version(needed)) < Version(least):
            pytest.skip(f"{needed} is older than {least}, which the build needs")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", *map(str, arguments), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel and install it into a folder of its own."""
    wheels = tmp_path_factory.mktemp("wheels")
    pip("wheel", source, "-w", wheels)
    (wheel,) = wheels.glob("*.whl")
    site = tmp_path_factory.mktemp("a site")
    pip("install", "--target", site, wheel)
    return site


def run(site: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_wheel_holds_every_file(installed: Path) -> None:
    for package in declared("options", "packages"):
        folder = ROOT / MAPPED.get(package, package.replace(".", "/"))
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                inside = installed / package.replace(".", "/") / path.relative_to(folder)
                assert inside.is_file(), f"{inside.relative_to(installed)} is not in the wheel"


def test_the_wheel_holds_nothing_else(installed: Path) -> None:
    there = {path.name.partition("-")[0] for path in installed.iterdir()}
    assert there == {"hpc_dl", "bin"}
    assert [path.name for path in (installed / "bin").iterdir()] == ["hpc-dl"]


def test_the_program_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [installed / "bin" / "hpc-dl", "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert __version__ in done.stdout


def test_only_one_tensorflow_is_asked_for() -> None:
    """Both builds hold the same files: a second one overwrites the first."""
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    section = dict(extras["options.extras_require"])
    wanted = {
        name: re.findall(r"^tensorflow[\w-]*", text.strip(), re.MULTILINE)
        for name, text in section.items()
    }
    assert wanted["tensorflow"] == ["tensorflow"]
    (together,) = re.findall(r"hpc_dl\[(.*)\]", section["all"])
    assert {"tensorflow", "tensorflow-cpu"} & set(together.split(",")) == {"tensorflow-cpu"}
    assert set(together.split(",")) < set(section)
    # The Makefile pins what `all` brings.
    assert re.search(r"^TENSORFLOW := tensorflow-cpu==", (ROOT / "Makefile").read_text(), re.M)


def test_jobs_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    done = run(installed, tmp_path, "-m", "hpc_dl.jobs.digits", "--epochs", "1", "--comm", "serial")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "summary.json").is_file()
    where = run(installed, tmp_path, "-c", "import hpc_dl.jobs as j; print(j.__file__)")
    assert where.stdout.startswith(str(installed))


def test_jobs_are_found_in_an_editable_installation(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    site = tmp_path_factory.mktemp("an editable site")
    pip("install", "--target", site, "-e", source)
    # Only a site folder has its .pth files read; the tests' own installation must not answer.
    script = (
        "import site, sys; "
        "own = lambda finder: 'Editable' in getattr(finder, '__name__', ''); "
        "sys.meta_path[:] = [finder for finder in sys.meta_path if not own(finder)]; "
        f"site.addsitedir({str(site)!r}); "
        "import hpc_dl.jobs.digits, hpc_dl.slurm; "
        "print(hpc_dl.jobs.__file__); print(hpc_dl.slurm.__file__)"
    )
    done = run(site, site, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [
        str(source / "jobs" / "__init__.py"),
        str(source / "slurm" / "__init__.py"),
    ]

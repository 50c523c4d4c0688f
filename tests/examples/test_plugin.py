"""The example of a compressor in a package of its own: it installs, trains, and is tested."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "plugin"
PATIENCE = 240

pytestmark = pytest.mark.timeout(PATIENCE + 60)


def install(source: Path, site: Path) -> None:
    """Install a package into a folder, from this machine alone."""
    for needed, least in (("pip", "21"), ("setuptools", "77"), ("wheel", "0.40")):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed, so nothing can be built offline")
        if Version(importlib.metadata.version(needed)) < Version(least):
            pytest.skip(f"{needed} is older than {least}, which the build needs")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = (sys.executable, "-m", "pip", "install", "--target", site, source, *options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a copy: a build leaves files in its folder."""
    copy = tmp_path_factory.mktemp("source") / "plugin"
    return Path(shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture(scope="module")
def site(source, tmp_path_factory):
    """Return a folder that holds the installed plugin and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    install(source, folder)
    return folder


def run(sites, folder, *arguments):
    """Run Python with the plugins of some folders; return its output, and then its errors."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ
        | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        | {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
        | {"PYTHONPATH": os.pathsep.join(map(str, sites))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


NAMES = "import hpc_dl.compress as c; print(*c.names(), c.make('ternary').describe(), sep='\\n')"


def test_it_is_listed(site, tmp_path):
    output, errors = run([site], tmp_path, "-c", NAMES)
    assert output.splitlines()[-2] == "ternary"
    assert output.splitlines()[-1].startswith("ternary:factor=0.7,error_feedback=fp32")
    assert errors == ""


def test_it_is_not_listed_where_it_is_not_installed(tmp_path):
    output, _ = run([], tmp_path, "-c", "import hpc_dl.compress as c; print(*c.names())")
    assert "ternary" not in output.split()


def test_it_trains_on_two_ranks(site, source, tmp_path):
    output, _ = run([site], tmp_path, "-m", "hpc_dl.cli", "launch", "-n", "2", source / "train.py")
    ((first, last),) = re.findall(r"loss ([\d.]+) -> ([\d.]+)", output)
    assert float(last) < float(first) / 100
    (ratio,) = re.findall(r"([\d.]+) times fewer bytes", output)
    assert 14 < float(ratio) < 16


def test_its_own_tests_pass(site, source):
    output, _ = run([site], source, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert re.search(r"\d\d+ passed", output), output


BROKEN = {
    "broken": "raise ZeroDivisionError('on purpose')",
    "other-name": """
        from dataclasses import dataclass
        from hpc_dl.compress import Codec

        @dataclass(frozen=True)
        class Thing(Codec):
            name = "thing"
    """,
    "no-class": "Thing = 3",
    "topk": "from hpc_dl.compress.topk import TopK as Thing",
}


def offer(site: Path, name: str, text: str) -> None:
    """Put a module and its entry point into a folder, as pip would."""
    module = f"plugin_{name.replace('-', '_')}"
    (site / f"{module}.py").write_text(textwrap.dedent(text))
    facts = site / f"{module}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[hpc_dl.compressors]\n{name} = {module}:Thing\n")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_is_one_warning(site, name, tmp_path):
    """It names the plugin, and harms no other."""
    offer(tmp_path, name, BROKEN[name])
    output, errors = run([tmp_path, site], tmp_path, "-c", NAMES)
    listed = output.splitlines()
    assert "ternary" in listed
    assert listed.count(name) == (name == "topk")  # the built-in one
    (line,) = errors.splitlines()
    assert name in line
    assert f"plugin_{name.replace('-', '_')}" in line


def test_the_guide_shows_this_package():
    guide = (ROOT / "docs" / "compression-plugins.md").read_text()
    module = (EXAMPLE / "hpc_dl_ternary" / "__init__.py").read_text()
    code = module.split('"""\n\n', 1)[1]
    assert f"```python\n{code}```" in guide
    entry = re.search(
        r"(?m)^\[project\.entry-points.*\n.*\n", (EXAMPLE / "pyproject.toml").read_text()
    )
    assert entry is not None
    assert entry[0] in guide
    body = code[code.index("@dataclass") :]
    assert len([line for line in body.splitlines() if line.strip()]) < 30

"""Every command and every marked example of the documentation runs."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATIENCE = 240

LANGUAGES = {"sh", "python", "text"}

#: Commands that are run elsewhere, or that install or build for minutes: by what.
ELSEWHERE = {
    "make demo": "tests/unit/test_makefile.py (the recipe), tests/jobs (what it launches)",
    "make test": "continuous integration, which is this run",
    "pip install 'hpc_dl[torch,mpi]'": "tests/unit/test_packaging.py (the built wheel)",
    "pip install 'hpc_dl[mpi,horovod,torch]'": "tests/unit/test_packaging.py (the built wheel)",
    "hpc-dl horovod build": "make test, before the tests on real ranks",
    "module load cuda": "nothing: a site's command",
    "pip install torch": "make test (a CPU build)",
    "hpc-dl horovod build --gpu nccl": "tests/unit/test_horovod_build_tools.py (what it is told)",
    "sbatch slurm/digits.sbatch": "tests/unit/test_slurm_scripts.py (its syntax)",
}

#: What a page's commands run, where the page does not show it itself.
STAND_INS = {"train.py": "import hpc_dl\n", "my_project/train.py": "import hpc_dl\n"}


class Example(NamedTuple):
    page: str
    ranks: int
    saved_as: str
    text: str


MARK = r"<!-- run on (\d+) ranks?(?:, saved as (\S+))? -->\n```python\n"


def examples() -> list[Example]:
    pattern = re.compile(MARK + r"(.*?)```", re.DOTALL)
    return [
        Example(page.name, int(ranks), saved_as, text)
        for page in PAGES
        for ranks, saved_as, text in pattern.findall(page.read_text())
    ]


def saved_by(page: str) -> dict[str, str]:
    """Return the files that a page tells its reader to save, by name."""
    return {e.saved_as: e.text for e in examples() if e.page == page and e.saved_as}


def fences(page: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, language) for every block of code in a page."""
    inside = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith(("```", "~~~")):
            inside = not inside
            if inside:
                yield number, line.strip()[3:]
    assert not inside, f"{page.name} has a block of code without an end"


def commands() -> list[tuple[str, str]]:
    blocks = re.compile(r"```sh\n(.*?)```", re.DOTALL)
    found = [
        (page.name, re.sub(r"\s+# .*", "", line.strip()))
        for page in PAGES
        for block in blocks.findall(page.read_text())
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    return list(dict.fromkeys(found))


def run(arguments: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        cwd=folder,
        env=os.environ
        | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        | {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
        | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_every_block_says_its_language():
    """A block without one would neither be run nor missed."""
    for page in PAGES:
        for line, language in fences(page):
            assert language in LANGUAGES, f"{page.name}:{line}: {language!r} is none of {LANGUAGES}"


def test_every_exception_is_still_in_use():
    assert set(ELSEWHERE) <= {command for _, command in commands()}


def test_every_python_example_is_marked():
    for page in PAGES:
        text = page.read_text()
        marked = len(re.findall(MARK, text))
        assert text.count("```python\n") == marked, f"{page.name} has an example that is not run"


@pytest.mark.parametrize("example", examples(), ids=lambda e: f"{e.page}-{e.ranks}")
def test_example(example, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(example.text)
    for name, text in saved_by(example.page).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    launch = [sys.executable, "-m", "hpc_dl.cli", "launch", "-n", str(example.ranks)]
    done = run([*launch, str(script)], tmp_path, TF_CPP_MIN_LOG_LEVEL="3")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("page", "command"), commands())
def test_command(page, command, tmp_path):
    if command in ELSEWHERE:
        return
    words = shlex.split(command)
    variables = {}
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    programs = {
        "hpc-dl": [sys.executable, "-m", "hpc_dl.cli"],
        "python": [sys.executable],
        "mpirun": [str(Path(sys.executable).with_name("mpirun"))],
    }
    assert words[0] in programs, f"{page}: no test runs {command!r}; add it to ELSEWHERE or here"
    words = [sys.executable if word == "python" else word for word in words]
    arguments = programs[words[0]] + words[1:] if words[0] in programs else words
    for name in ("jobs", "examples", "benchmarks", "tests", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, text in (STAND_INS | saved_by(page)).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    done = run(arguments, tmp_path, **variables)
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

"""Bad options of jobs get an answer at once."""

import sys

import click
import pytest
from click.testing import CliRunner

from hpc_dl.cli.job import momentum_beside
from hpc_dl.jobs import digits, resnet50

JOBS = [digits.main, resnet50.main]


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--framework", "jax"], "'jax' is not one of 'torch', 'keras'"),
        (["--epochs", "0"], "0 is not in the range x>=1"),
        (["--batch-size", "0"], "0 is not in the range x>=1"),
        (["--lr", "0"], "0.0 is not a finite number above 0"),
        (["--lr", "nan"], "nan is not a finite number above 0"),
        (["--seed", "-1"], "-1 is not in the range"),
        (["--epoch", "3"], "No such option '--epoch'"),
    ],
)
def test_bad_options(job: click.Command, options: list[str], said: str) -> None:
    result = CliRunner().invoke(job, options)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("framework", "needed", "extra"),
    [("torch", "torch", "torch"), ("keras", "keras", "tensorflow")],
)
def test_a_missing_framework_names_the_extra(
    job: click.Command,
    framework: str,
    needed: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, needed, None)
    result = CliRunner().invoke(job, ["--framework", framework])
    assert result.exit_code == 1
    assert f"Error: --framework {framework} needs {needed}" in result.output
    assert f"pip install 'hpc_dl[{extra}]'" in result.output


@pytest.mark.parametrize("job", JOBS)
def test_help_has_examples_and_defaults(job: click.Command) -> None:
    result = CliRunner().invoke(job, ["--help"])
    assert result.exit_code == 0
    assert "Examples:\n" in result.output
    assert "[default: torch]" in result.output


@pytest.mark.parametrize(
    ("compression", "expected"),
    [
        ("none", 0.9),
        ("auto", 0.9),
        ("powersgd:rank=2", 0.9),
        ("topk", 0.9),
        ("dgc", 0.0),
        ("topk:momentum=0.9", 0.0),
        ("dgc:momentum=0", 0.9),
    ],
)
def test_the_optimizer_has_momentum_where_compression_has_none(
    compression: str, expected: float
) -> None:
    assert momentum_beside(compression, 0.9) == expected

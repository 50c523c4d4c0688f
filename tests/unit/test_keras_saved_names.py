"""A state of compression finds its variables in a model that was loaded from a file."""

import numpy as np
import pytest

pytest.importorskip("keras")

from hpc_dl.errors import OptionError
from hpc_dl.keras.saved_names import renamed

STATE = {"net/a/kernel": {"residual": np.ones(2), "state.q.net/a/kernel": np.ones(3)}}


@pytest.mark.parametrize("name", ["net/a/kernel", "a/kernel", "outer/net/a/kernel"])
def test_names_may_gain_and_lose_folders(name):
    (found,) = renamed(STATE, ["net/b/kernel", name])
    assert found == name
    assert set(renamed(STATE, [name])[name]) == {"residual", f"state.q.{name}"}


@pytest.mark.parametrize("names", [["a/bias"], ["na/kernel"], ["x/net/a/kernel", "a/kernel"]])
def test_a_variable_that_is_not_there_or_several_is_an_error(names):
    with pytest.raises(OptionError, match="of the same model"):
        renamed(STATE, names)


def test_no_state_fits_everything():
    assert renamed({}, ["a"]) == {}

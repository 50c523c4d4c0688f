"""Find the variables of a saved state again: Keras gives them other paths when it loads a model.

``net/hidden/kernel`` of a model that was made in Python is ``hidden/kernel`` of the same one
loaded from a file.
"""

from collections.abc import Sequence

from hpc_dl.errors import OptionError
from hpc_dl.reduce import Saved
from hpc_dl.world.choice import CHOICE


def renamed(saved: Saved, names: Sequence[str]) -> Saved:
    """Give a state of compression the names that variables have now.

    Args:
        saved: by the names that they had.
        names: of all variables.

    Raises:
        OptionError: a variable in ``saved`` that is not there, or might be several.
    """
    result: Saved = {}
    for old, state in saved.items():
        if old == CHOICE:
            result[old] = state
            continue
        found = [old] if old in names else [name for name in names if _same_end(old, name)]
        if len(found) != 1:
            raise OptionError(
                f"the state of compression is of a variable {old!r}, which fits "
                f"{', '.join(found) or 'none'} of the {len(names)} variables here "
                f"({', '.join(names[:3])}, ...); load that of the same model"
            )
        new = found[0]
        result[new] = {
            key.removesuffix(old) + new if key.endswith(f".{old}") else key: value
            for key, value in state.items()
        }
    return result


def _same_end(one: str, other: str) -> bool:
    return one.endswith(f"/{other}") or other.endswith(f"/{one}")

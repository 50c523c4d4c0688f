"""The suite that every compressor must pass; authors of one inherit it in their tests.

A class of tests names the variants to be tested, and pytest does the rest::

    from hpc_dl.testing.compression import Claims, CompressorConformance

    class TestMine(CompressorConformance):
        @pytest.fixture(params=["mine", "mine:ratio=0.1", "mine:error_feedback=bf16"])
        def compression(self, request):
            return request.param

A variant is a spec string, a compressor or a scheme. What the compressor promises beyond the
contract, or cannot promise, goes into a fixture ``claims``::

        @pytest.fixture
        def claims(self):
            return Claims(unbiased=True)

Ranks are threads: no launcher is needed.
"""

import pytest

pytest.register_assert_rewrite(
    *(
        f"{__name__}.{module}"
        for module in ("contract", "edges", "estimates", "not_finite", "sameness", "state", "suite")
    )
)

from hpc_dl.testing.compression.contract import ContractConformance  # noqa: E402
from hpc_dl.testing.compression.edges import EdgesConformance  # noqa: E402
from hpc_dl.testing.compression.estimates import EstimatesConformance  # noqa: E402
from hpc_dl.testing.compression.not_finite import NotFiniteConformance  # noqa: E402
from hpc_dl.testing.compression.sameness import SamenessConformance  # noqa: E402
from hpc_dl.testing.compression.state import StateConformance  # noqa: E402
from hpc_dl.testing.compression.suite import Claims  # noqa: E402


class CompressorConformance(
    ContractConformance,
    EstimatesConformance,
    EdgesConformance,
    NotFiniteConformance,
    SamenessConformance,
    StateConformance,
):
    """All that a compressor promises."""


__all__ = ["Claims", "CompressorConformance"]

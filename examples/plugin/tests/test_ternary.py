"""The compressor does what hpc_dl asks of every compressor."""

import pytest
from hpc_dl_ternary import Ternary

from hpc_dl.errors import OptionError
from hpc_dl.testing.compression import Claims, CompressorConformance


class TestTernary(CompressorConformance):
    @pytest.fixture(params=["ternary", "ternary:factor=0.2", "ternary:error_feedback=int8"])
    def compression(self, request):
        return request.param

    @pytest.fixture
    def claims(self):
        return Claims(error=0.8)


@pytest.mark.parametrize("factor", [-0.1, 1.0, float("nan")])
def test_bad_factor(factor):
    with pytest.raises(OptionError, match="factor"):
        Ternary(factor)

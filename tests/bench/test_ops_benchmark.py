"""Single ops under pytest-benchmark: `pytest tests/bench/test_ops_benchmark.py -m slow --benchmark-autosave`.

For a quick look at one op and a comparison with a saved run (`--benchmark-compare`); what is reported comes from
`csae bench`, whose rounds are interleaved.
"""

import pytest
import torch

from csae.bench.cases import BACKWARD, DECODE, ENCODE, LOOK_BACK
from csae.bench.data import SHAPES, Data

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.slow

OPS = {case.name: case for case in (ENCODE, DECODE, BACKWARD, LOOK_BACK)}


@pytest.mark.parametrize("name", OPS)
def test_op(name, benchmark):
    data = Data(SHAPES["small"], torch.float32, torch.device("cpu"))
    benchmark.pedantic(OPS[name].implementations["csae"](data).run, rounds=10, warmup_rounds=2)

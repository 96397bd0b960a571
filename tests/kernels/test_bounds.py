"""No kernel reaches past a tensor, and none loses an element whose offset takes more than 32 bits."""

import mmap
import textwrap
from pathlib import Path

import pytest
import torch

from dragon.kernels import table
from dragon.kernels.norm import SPAN

from ..forking import Ended, Forking
from .tables import Row, Tables, place, spec_of

ROOT = Path(__file__).parents[2]

# Linux's value; Python names it from 3.11 on.
MAP_NORESERVE = 0x4000

# In a process of its own: reaching past a tensor is a segmentation fault there. The sizes are around whole vectors
# and chunks, and multiples of 16 bytes that are none of 16 elements, so that a tail ends at the page too.
PRELUDE = """
    import itertools, torch, warnings
    warnings.simplefilter("error")
    from tests.interpreter import speed_up
    speed_up()
    from dragon.kernels import table
    from dragon.vm.testing import protected_tensor
    from tests.kernels.tables import Row, Tables, name_of, spec_of
    NUMELS = (1, 4, 8, 15, 16, 17, 20, 24, 127, 128, 132, 136, 256, 268)
    GROUP = {table.LR: 0.1, table.BETA1: 0.9, table.BETA2: 0.99, table.EPS: 1e-8}
    def rows(n_states, dtype, extra=0):
        for numel, edge in itertools.product(NUMELS, ("start", "end")):
            tensors = [protected_tensor(numel, dtype, edge=edge) for _ in range(3 + n_states)]
            row = Row(*tensors[:2], tuple(tensors[2:-1]), ema=tensors[-1], step=torch.zeros(()))
            row.numel += extra
            yield row
"""
UPDATE = """
    def update(dtype, extra=0):
        members = list(rows(3, dtype, extra))
        tables = Tables(members, [GROUP])
        tables.advance()
        tables.update(spec_of("adam", members[0], zero_grad=True))
"""


def run(forking: Forking, *code: str) -> Ended:
    return forking.run("-c", "".join(map(textwrap.dedent, code)), cwd=ROOT)


@pytest.mark.usefixtures("interpreted")
def test_no_update_reaches_past_a_tensor(forking: Forking) -> None:
    done = run(forking, PRELUDE, UPDATE, "update(torch.float32)\nupdate(torch.bfloat16)")
    assert done.code == 0, done.err


@pytest.mark.usefixtures("interpreted")
def test_no_norm_reaches_past_a_gradient(forking: Forking) -> None:
    norm = """
        Tables(list(rows(0, torch.float32))).reduce(1)
        Tables(list(rows(0, torch.bfloat16))).reduce(2, "bfloat16")
        Tables(list(rows(0, torch.float32))).reduce(1, "float32", "float32")
    """
    done = run(forking, PRELUDE, norm)
    assert done.code == 0, done.err


@pytest.mark.usefixtures("interpreted")
def test_an_update_that_reaches_one_element_too_far_crashes(forking: Forking) -> None:
    done = run(forking, PRELUDE, UPDATE, "update(torch.float32, extra=1)")
    assert done.code < 0, "the fence is open: nothing stopped an access past the end of a tensor"


def sparse(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros whose memory is only taken where it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("misalign", [0, 1])
def test_elements_past_two_to_the_31_are_updated(misalign: int) -> None:
    numel = 2**31 + 128 + 9
    row = Row(sparse(numel + misalign, torch.float32)[misalign:], sparse(numel, torch.bfloat16))
    row.grad[-137 - 128 :] = 1
    last = 2**31 // 128
    # All chunks but the last few hold zeros: to leave them out costs nothing and proves as much.
    chunks = [(0, last - 1), (0, last), (0, last + 1)]
    Tables([row], chunks=chunks).set_scalars().update(spec_of("accumulate", row))
    assert torch.equal(row.param[-137 - 128 :], torch.ones(137 + 128))
    assert not row.param[: 2**12].any(), "an offset wrapped around"


@pytest.mark.usefixtures("interpreted")
def test_a_norm_sees_elements_past_two_to_the_31() -> None:
    numel = 2**31 + 5
    row = Row(grad=sparse(numel, torch.float32), numel=1)
    row.grad[-5:] = 2.0
    tables = Tables([row])
    last = 2**31 // SPAN.value
    tables.spans = [(0, last)]
    tables.span_table = torch.tensor(tables.spans, dtype=torch.int32)
    tables.tensors[0, table.NUMEL.value] = numel
    # So that the one span that is reduced is the first of the partials.
    tables.tensors[0, table.FIRST_PARTIAL.value] = -last
    tables.reduce(1)
    assert tables.partials.tolist() == [20.0]


@pytest.mark.usefixtures("interpreted")
def test_a_row_far_into_the_tables_finds_its_own_tensor() -> None:
    rows = [Row(place(torch.zeros(3)), place(torch.full((3,), float(i)))) for i in range(300)]
    Tables(rows, chunks=[(299, 0), (7, 0)]).set_scalars().update(spec_of("accumulate", rows[0]))
    assert [row.param.tolist() for row in (rows[7], rows[299], rows[8])] == [[7.0] * 3, [299.0] * 3, [0.0] * 3]

import mmap
import signal
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.testing import Fenced, FenceError, protected_tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int32]
LAYOUTS = [((4,), (1,)), ((3, 4), (1, 3)), ((3, 4), (8, 2)), ((), ()), ((0, 3), (3, 1)), ((2, 3), (0, 0))]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect needs Linux")


@given(st.sampled_from(LAYOUTS), st.sampled_from(DTYPES), st.integers(0, 3))
def test_writes_inside_pass_and_every_write_outside_is_caught(layout, dtype, misalign):
    shape, strides = layout
    fenced = Fenced(shape, strides=strides, dtype=dtype, misalign=misalign)
    assert fenced.tensor.shape == shape
    assert fenced.tensor.stride() == strides
    inside = {fenced.tensor.storage_offset() + offset for offset in offsets(shape, strides)}
    everything = fenced.tensor.as_strided((fenced.tensor.untyped_storage().size() // dtype.itemsize,), (1,), 0)
    for offset in inside:
        everything[offset] = 1
    fenced.check()
    for offset in set(range(len(everything))) - inside:
        before = everything[offset].clone()
        everything[offset] = 0
        with pytest.raises(FenceError, match="1 element"):
            fenced.check()
        everything[offset : offset + 1].view(torch.uint8).fill_(0xFF)
        assert before.reshape(1).view(torch.uint8).eq(0xFF).all()


def offsets(shape, strides):
    grid = [0]
    for n, stride in zip(shape, strides, strict=True):
        grid = [base + i * stride for base in grid for i in range(n)]
    return grid


@pytest.mark.parametrize(
    ("offset", "place"),
    [(-2, r"2 element\(s\) before its first"), (1, "between its elements"), (5, r"1 element\(s\) past its last")],
)
def test_the_message_says_where(offset, place):
    fenced = Fenced((3,), strides=(2,))
    fenced.tensor.as_strided((1,), (1,), fenced.tensor.storage_offset() + offset).zero_()
    with pytest.raises(FenceError, match=f"exp_avg of shape .*{place}"):
        fenced.check("exp_avg")


def test_like_keeps_values_strides_and_expansion():
    for values in (torch.randn(3, 4).t(), torch.randn(5)[::2], torch.ones(1).expand(2, 3), torch.tensor(2.0)):
        fenced = Fenced.like(values, misalign=1)
        assert fenced.tensor.stride() == values.stride()
        assert torch.equal(fenced.tensor, values)
        fenced.check()


def test_alignment_is_as_asked():
    assert Fenced((5,)).tensor.data_ptr() % 16 == 0
    assert Fenced((5,), misalign=1).tensor.data_ptr() % 16 == 4


@pytest.mark.parametrize("options", [{"strides": (-1,)}, {"strides": (1, 1)}, {"misalign": -1}], ids=str)
def test_impossible_strides_and_starts_are_refused(options):
    with pytest.raises(ValueError, match="one stride a dimension"):
        Fenced((3,), **options)


@linux
@given(st.integers(0, 3000), st.sampled_from(DTYPES), st.sampled_from(["start", "end"]))
def test_a_protected_tensor_is_ordinary_inside(numel, dtype, edge):
    tensor = protected_tensor(numel, dtype, edge=edge)
    assert (tensor.shape, tensor.dtype) == ((numel,), dtype)
    if numel:
        border = tensor.data_ptr() + (numel * dtype.itemsize if edge == "end" else 0)
        assert border % mmap.PAGESIZE == 0
    assert torch.equal(tensor.fill_(1), torch.ones(numel, dtype=dtype))


@linux
def test_a_view_keeps_the_memory_of_a_protected_tensor():
    views = [protected_tensor(1024)[5:] for _ in range(20)]
    assert sum(view.add_(1).sum().item() for view in views) == 20 * 1019


REACH = """
import torch
from dragon.vm.testing import protected_tensor
tensor = protected_tensor(100, edge="{edge}")
print("alive", tensor.sum().item(), flush=True)
import ctypes
ctypes.c_float.from_address(tensor.data_ptr() + {offset}).value
"""


@linux
@pytest.mark.parametrize(("edge", "offset"), [("end", 400), ("start", -4)])
def test_reaching_past_a_protected_tensor_is_a_segmentation_fault(edge, offset, forking, tmp_path):
    ended = forking.run("-c", REACH.format(edge=edge, offset=offset), cwd=tmp_path)
    assert ended.out.startswith("alive 0.0")
    assert ended.code == -signal.SIGSEGV


def test_a_protected_tensor_says_that_it_needs_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match=r"needs Linux .* this is darwin"):
        protected_tensor(3)


@pytest.mark.parametrize("arguments", [{"numel": -1}, {"numel": 1, "edge": "middle"}])
def test_impossible_protected_tensors_are_refused(arguments):
    with pytest.raises(ValueError, match=r"edge must be|numel must not"):
        protected_tensor(**arguments)

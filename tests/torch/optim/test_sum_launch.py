"""Launches that add gradients to sums: of other tensors each time, and interrupted ones."""

from functools import partial

import pytest
import torch

from dragon.vm.torch.optim._backends import triton as backend
from dragon.vm.torch.optim._groups.flattening import Signature

from .interrupts import Interrupt, Tracer
from .support import numbers

FP32 = torch.float32
SHORT, LONG = (5, 17), (9000, 1)

pytestmark = pytest.mark.usefixtures("interpreted")


def new_launch() -> backend.SumLaunch:
    return backend.SumLaunch(Signature("triton", torch.device("cpu"), FP32, FP32, (), (), None, False))


def check_sum(launch: backend.SumLaunch, numels: tuple[int, ...]) -> list[torch.Tensor]:
    """Check that gradients are added whole, and nothing else."""
    totals = [numbers(1, numel) for numel in numels]
    grads = [numbers(2, numel) for numel in numels]
    expected = [total + grad for total, grad in zip(totals, grads, strict=True)]
    launch.add(totals, grads)
    assert all(map(torch.equal, totals, expected))
    return grads


def test_sums_of_other_sizes_are_whole() -> None:
    launch = new_launch()
    for numels in (SHORT, LONG, LONG, SHORT, LONG[::-1], (*SHORT, 3), (0, 3), (0, 0), SHORT):
        check_sum(launch, numels)


@pytest.mark.parametrize("next_numels", [SHORT, LONG])
@pytest.mark.parametrize("numels", [SHORT, LONG])
@pytest.mark.parametrize("is_first", [False, True])
def test_an_interrupt_where_a_launch_is_kept_leaves_the_next_sums_whole(
    is_first: bool, numels: tuple[int, ...], next_numels: tuple[int, ...]
) -> None:
    held: list[torch.Tensor] = []

    def interrupted() -> backend.SumLaunch:
        launch = new_launch()
        if not is_first:
            # The next gradients lie elsewhere: where addresses are the same, fewer bytecodes write them.
            held[:] = check_sum(launch, SHORT)
        return launch

    counter = Tracer(None, backend.__file__)
    counter.run(partial(check_sum, interrupted(), numels))
    # Its last bytecodes keep it.
    assert counter.count > 25
    for at in range(counter.count - 25, counter.count + 1):
        launch = interrupted()
        with pytest.raises(Interrupt):
            Tracer(at, backend.__file__).run(partial(check_sum, launch, numels))
        check_sum(launch, next_numels)

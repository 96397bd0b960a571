"""The bounds do what an optimizer would, and nothing beside it."""

import torch

from benchmarks import bounds
from benchmarks.cases import CASES, FP32, Case
from benchmarks.contenders import CONTENDERS
from benchmarks.shapes import equal
from benchmarks.targets import rivals
from benchmarks.workload import Workload, make_origin

from .test_runner import records_of

CPU = torch.device("cpu")


def test_addresses_are_read_of_five_tensors_a_parameter() -> None:
    workload = Workload(make_origin(Case("few", equal(7, 3)), FP32, CPU))
    params, grads, states = bounds.addresses(workload)()
    assert params == [param.data_ptr() for param in workload.params]
    assert grads == [param.grad.data_ptr() for param in workload.params]
    assert len(states) == 3 * 7


def test_the_flat_bound_moves_parameters_into_one_buffer() -> None:
    workload = Workload(make_origin(Case("few", equal(7, 3)), FP32, CPU))
    before = [param.detach().clone() for param in workload.params]
    step = bounds.flat_operation(workload)
    assert all(map(torch.equal, before, workload.params))
    assert len({param.untyped_storage().data_ptr() for param in workload.params}) == 1
    step()
    assert not any(map(torch.equal, before, workload.params))


def test_a_bound_is_no_rival_and_takes_part_in_plain_updates_only() -> None:
    chosen = [CONTENDERS[name] for name in ("torch fused", "torch foreach", "ours native", "bound flat operation")]
    found = records_of(*chosen)
    assert found["bound flat operation"].ratio is not None
    (rival,) = rivals(list(found.values()), "cpu")
    assert rival.other.contender.startswith("torch")
    assert "plain update" in (CONTENDERS["bound operation"].why_not(CASES["chain, 1000 x 1000"]) or "")

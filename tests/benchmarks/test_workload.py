"""Contenders start from equal tensors of their own."""

import torch

from benchmarks.cases import BF16, FP32, Case
from benchmarks.shapes import equal
from benchmarks.workload import Workload, make_origin

CPU = torch.device("cpu")


def addresses(workload: Workload) -> set[int]:
    return {tensor.data_ptr() for param in workload.params for tensor in (param, param.grad)}


def test_two_workloads_are_equal_and_share_no_memory() -> None:
    origin = make_origin(Case("", equal(3, 10)), BF16, CPU)
    first, second = Workload(origin), Workload(origin)
    for a, b, p, g in zip(first.params, second.params, origin.params, origin.grads, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, p)
        assert torch.equal(a.grad, b.grad)
        assert torch.equal(a.grad, g)
        assert a.dtype == torch.bfloat16
    assert addresses(first).isdisjoint(addresses(second))


def test_an_origin_is_the_same_each_time() -> None:
    first, second = (make_origin(Case("", equal(3, 10)), FP32, CPU) for _ in range(2))
    assert all(map(torch.equal, [*first.params, *first.grads], [*second.params, *second.grads]))


def test_every_parameter_is_in_one_group_and_each_group_has_its_learning_rate() -> None:
    workload = Workload(make_origin(Case("", equal(7, 2), n_groups=3), FP32, CPU))
    assert [param for group in workload.groups for param in group["params"]] == workload.params
    assert all(group["params"] for group in workload.groups)
    assert len({group["lr"] for group in workload.groups}) == 3


def test_a_chain_meets_whole_gradients_at_each_step() -> None:
    workload = Workload(make_origin(Case("", equal(3, 10), chain=True), FP32, CPU))
    before = addresses(workload)
    workload.params[0].grad.zero_()
    workload.before_step()
    assert torch.equal(workload.params[0].grad, workload.origin.grads[0])
    assert addresses(workload) == before


def test_new_gradients_have_other_addresses_and_the_same_values() -> None:
    workload = Workload(make_origin(Case("", equal(3, 10), new_grads=True), FP32, CPU))
    before = [param.grad.data_ptr() for param in workload.params]
    workload.before_step()
    assert not set(before) & {param.grad.data_ptr() for param in workload.params}
    assert torch.equal(workload.params[0].grad, workload.origin.grads[0])
    workload.before_step()
    assert before == [param.grad.data_ptr() for param in workload.params]

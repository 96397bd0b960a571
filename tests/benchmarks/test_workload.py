"""Contenders start from equal tensors of their own, and every step meets new gradients and learning rates."""

import torch

from benchmarks.cases import BF16, FP32, Case
from benchmarks.workload import Workload, lr_of, make_origin
from dragon.vm.measuring.shapes import equal

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


def test_each_step_meets_whole_gradients_at_new_addresses() -> None:
    workload = Workload(make_origin(Case("", equal(3, 10), chain=True), FP32, CPU))
    for _ in range(3):
        before = [param.grad.data_ptr() for param in workload.params]
        workload.params[0].grad.zero_()
        workload.before_step()
        assert torch.equal(workload.params[0].grad, workload.origin.grads[0])
        assert all(param.grad.data_ptr() != old for param, old in zip(workload.params, before, strict=True))


def test_each_step_meets_whole_gradients_in_their_place_in_a_case_that_keeps_them() -> None:
    workload = Workload(make_origin(Case("", equal(3, 10), kept=True), FP32, CPU))
    before = [param.grad for param in workload.params]
    for _ in range(3):
        workload.params[0].grad.zero_()
        workload.before_step()
        assert torch.equal(workload.params[0].grad, workload.origin.grads[0])
        assert all(param.grad is old for param, old in zip(workload.params, before, strict=True))


def test_each_step_meets_a_new_learning_rate_in_each_group() -> None:
    workload = Workload(make_origin(Case("", equal(4, 2), n_groups=2), FP32, CPU))
    optimizer = torch.optim.Adam([{**group, "lr": torch.tensor(group["lr"])} for group in workload.groups[:1]])
    optimizer.add_param_group(workload.groups[1])
    workload.schedule(optimizer)
    for n_steps in range(1, 4):
        workload.before_step()
        tensor, number = (group["lr"] for group in optimizer.param_groups)
        assert torch.equal(tensor, torch.tensor(lr_of(0, 2, n_steps)))
        assert number == lr_of(1, 2, n_steps) != lr_of(1, 2, n_steps - 1)


def test_another_half_of_changing_gradients_is_there_at_each_step() -> None:
    workload = Workload(make_origin(Case("", equal(100, 2), changing=True), FP32, CPU))
    seen = []
    for _ in range(4):
        workload.before_step()
        seen.append([param.grad is not None for param in workload.params])
    assert all(seen[0])
    assert all(35 < sum(present) < 65 for present in seen[1:])
    assert len(set(map(tuple, seen))) == 4

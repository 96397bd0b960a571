"""Without its device an optimizer does all of the host's work, and nothing else."""

import torch

from benchmarks.cases import CASES, FP32
from benchmarks.contenders import CONTENDERS
from benchmarks.hostwork import no_launches, no_operations
from benchmarks.workload import Workload, make_origin
from dragon.kernels import launch

CPU = torch.device("cpu")


def workload_of(name: str) -> Workload:
    return Workload(make_origin(CASES[name], FP32, CPU))


def test_our_steps_are_two_launches_for_any_number_of_tensors_and_groups() -> None:
    for name in ("10 x 16", "465 groups"):
        with no_launches() as launches:
            step = CONTENDERS["ours triton-host"].build(workload_of(name))
            step()
            launches.n_calls = 0
            step()
            assert launches.n_calls == 2, name


def test_a_chain_is_three_launches() -> None:
    with no_launches() as launches:
        step = CONTENDERS["ours triton-host"].build(workload_of("chain, 1000 x 1000"))
        step()
        launches.n_calls = 0
        step()
        assert launches.n_calls == 3


def test_torchs_steps_are_two_operations_a_group() -> None:
    with no_operations() as operations:
        step = CONTENDERS["torch fused-host"].build(workload_of("465 groups"))
        step()
        operations.n_calls = 0
        step()
        assert operations.n_calls == 2 * 465


def test_parameters_stay_as_they_are_and_kernels_come_back() -> None:
    workload = workload_of("10 x 16")
    kernels, operation = dict(launch.UPDATE_KERNELS), torch._fused_adam_
    for name in ("ours triton-host", "torch fused-host"):
        with CONTENDERS[name].context():
            CONTENDERS[name].build(workload)()
    assert all(map(torch.equal, workload.params, workload.origin.params))
    assert kernels == launch.UPDATE_KERNELS
    assert torch._fused_adam_ is operation
    CONTENDERS["torch fused"].build(workload)()
    assert not torch.equal(workload.params[0], workload.origin.params[0])

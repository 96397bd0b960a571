"""Without its device an optimizer does all of the host's work, and nothing else."""

from collections import Counter

import pytest
import torch

from benchmarks import host
from benchmarks.cases import FP32, Case
from benchmarks.workload import Workload, make_origin
from dragon.kernels import launch
from dragon.vm.measuring.shapes import equal

CPU = torch.device("cpu")


def workload_of(n_tensors: int, n_groups: int = 1) -> Workload:
    return Workload(make_origin(Case("", equal(n_tensors, 16), n_groups=n_groups), FP32, CPU))


def calls_of_a_step(name: str, workload: Workload) -> int:
    step = host.CONTENDERS[name](workload)
    with host.no_device() as counter:
        step()
        workload.before_step()
        counter.n_calls = 0
        step()
    return counter.n_calls


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("n_tensors", "n_groups"), [(10, 1), (30, 7)])
def test_our_steps_are_two_launches_for_any_number_of_tensors_and_groups(n_tensors: int, n_groups: int) -> None:
    assert calls_of_a_step("ours triton-host", workload_of(n_tensors, n_groups)) == 2


def test_torchs_steps_are_two_operations_a_group() -> None:
    assert calls_of_a_step(host.REFERENCE, workload_of(30, 7)) == 2 * 7


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", host.CONTENDERS)
def test_parameters_stay_as_they_are_and_kernels_come_back(name: str) -> None:
    workload = workload_of(10)
    replaced = {key: value for key, value in vars(launch).items() if key.endswith("_kernel")}
    assert calls_of_a_step(name, workload) > 0
    assert all(map(torch.equal, workload.params, workload.origin.params))
    assert {key: getattr(launch, key) for key in replaced} == replaced
    assert len(replaced) >= 3
    host.CONTENDERS[host.REFERENCE](workload)()
    assert not torch.equal(workload.params[0], workload.origin.params[0])


@pytest.mark.usefixtures("interpreted")
def test_every_contender_is_measured_with_few_and_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "N_TENSORS", (2, 5))
    n_threads = torch.get_num_threads()
    found = host.measure_all(3, {"device": "a CPU"}, "a test")
    assert torch.get_num_threads() == n_threads
    assert Counter(record.case for record in found) == dict.fromkeys(
        [f"host, {n} x 16{end}" for end in ("", ", kept gradients") for n in (2, 5)], len(host.CONTENDERS)
    )
    assert Counter(record.contender for record in found) == dict.fromkeys(host.CONTENDERS, 4)
    for record in found:
        assert record.host_ms is not None
        assert record.host_ms.n == 3
        assert record.ratio is not None
        assert record.environment == {"device": "a CPU", "n_threads": 1}
    assert {record.ratio.median for record in found if record.contender == host.REFERENCE} == {1.0}


def test_a_step_whose_work_is_not_replaced_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(host.CONTENDERS, "ours native-host", lambda workload: lambda: None)
    with pytest.raises(RuntimeError, match="ours native-host: a step calls none"):
        host.measure(2, 3, {})

"""How often kernels are launched, compiled and fed: by what is asked for, never by how many tensors there are."""

import sys
from collections import Counter

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dragon.kernels import launch
from dragon.vm.torch.optim import SGD, Adam
from dragon.vm.torch.optim._backends import context
from dragon.vm.torch.optim._table.table import DeviceTable

from .support import everything, give_gradients, parameters, twin


class Recorder:
    """Stands for a kernel: notes each launch, and does nothing."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *pointers, **constants: self.launches.append((self.name, grid, pointers, constants))

    def warmup(self, *pointers, **constants):
        pass


@pytest.fixture
def launches(monkeypatch):
    """All launches of kernels, which do nothing."""
    found = []
    for name in ("norm", "advance", "update"):
        monkeypatch.setattr(launch, f"{name}_kernel", Recorder(name, found))
    return found


@pytest.fixture
def uploads(monkeypatch):
    """One entry for each copy of a table to the device."""
    found = []
    plain = DeviceTable.upload

    def upload(self):
        before = self.n_uploads
        plain(self)
        found.extend([self] * (self.n_uploads - before))

    monkeypatch.setattr(DeviceTable, "upload", upload)
    return found


def optimizer_of(n_tensors, n_groups, algorithm=Adam, numel=1, **options):
    params = parameters([(numel,)] * n_tensors)
    give_gradients(params, 0)
    groups = [{"params": params[i::n_groups], "lr": 0.001 * (i + 1)} for i in range(n_groups)]
    return algorithm(groups, backend="triton", **options), params


def names(launches):
    return [name for name, *_ in launches]


@pytest.mark.parametrize(("n_tensors", "n_groups"), [(1, 1), (10, 1), (10, 3), (1000, 1), (1000, 3), (1000, 465)])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["advance", "update"]),
        ({"amsgrad": True, "ema_decay": 0.9, "clip_value": 1.0}, ["advance", "update"]),
        ({"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9}, ["norm", "advance", "update"]),
        ({"clip_norm": 1.0}, ["norm", "advance", "update"]),
    ],
)
def test_a_step_is_two_launches_or_three_with_a_norm(
    launches, n_tensors, n_groups, options, expected, interpreted
):
    optimizer, _ = optimizer_of(n_tensors, n_groups, **options)
    for _ in range(2):
        launches.clear()
        optimizer.step()
        assert names(launches) == expected


def test_the_interpreter_launches_what_the_recorder_counts(monkeypatch, interpreted):
    counted = Counter()
    plain = launch.Launcher.__call__

    def counting(launcher, *tables):
        counted[launcher.name] += 1
        plain(launcher, *tables)

    monkeypatch.setattr(launch.Launcher, "__call__", counting)
    optimizer, _ = optimizer_of(10, 3, max_grad_norm=1.0)
    optimizer.step()
    assert counted == {"norm": 1, "advance": 1, "update": 1}
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_sgd_takes_as_many(launches, interpreted):
    for options in ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}):
        optimizer, _ = optimizer_of(10, 3, SGD, **options)
        launches.clear()
        optimizer.step()
        assert names(launches) == ["advance", "update"]


@pytest.mark.parametrize(("arch", "dtype"), [("sm_90", "float64"), ("sm_103", "float32")])
def test_squares_are_summed_as_the_architecture_does_it_fast(monkeypatch, launches, interpreted, arch, dtype):
    monkeypatch.setattr(context, "describe", lambda device: context.Hardware("a GPU", arch, 1, 32))
    optimizer, _ = optimizer_of(3, 1, max_grad_norm=1.0)
    optimizer.step()
    assert [found["SUM_DTYPE"] for name, _, _, found in launches if name == "norm"] == [dtype]


@pytest.mark.parametrize(("warp_size", "n_warps"), [(32, 4), (64, 2)])
def test_launches_are_for_the_warps_of_the_device(monkeypatch, launches, interpreted, warp_size, n_warps):
    monkeypatch.setattr(context, "describe", lambda device: context.Hardware("a GPU", "gfx90a", 1, warp_size))
    optimizer, _ = optimizer_of(3, 1, max_grad_norm=1.0)
    optimizer.step()
    norm, advance, update = (found for *_, found in launches)
    assert [norm["num_warps"], advance["num_warps"], update["WARP_SIZE"]] == [n_warps, n_warps, warp_size]


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"clip_norm": 0.5}], ids=str)
def test_a_step_clips_by_sums_in_float32_as_by_those_in_float64(monkeypatch, interpreted, options):
    found = []
    for arch in ("sm_90", "sm_103"):
        monkeypatch.setattr(context, "describe", lambda device, arch=arch: context.Hardware("", arch, 1, 32))
        optimizer, params = optimizer_of(5, 2, numel=5000, eps=1e-2, **options)
        for seed in range(3):
            give_gradients(params, seed)
            optimizer.step()
        found.append(params)
    for left, right in zip(*found, strict=True):
        assert_close(left, right, rtol=4 * 2.0**-23, atol=0)


def test_sums_take_one_launch_each_after_the_first(launches, interpreted):
    optimizer, params = optimizer_of(10, 3)
    found = []
    for seed in range(3):
        launches.clear()
        give_gradients(params, seed)
        optimizer.sum_grad()
        found.append(names(launches))
    # The first one copies, and the second one leaves its scalars to all others.
    assert found == [[], ["advance", "update"], ["update"]]


def test_tensors_without_elements_take_no_launch_that_would_have_no_program(launches, interpreted):
    optimizer, _ = optimizer_of(3, 1, numel=0, max_grad_norm=1.0)
    optimizer.step()
    assert names(launches) == ["advance"]


def test_zeroing_gradients_takes_no_launch_of_its_own(launches, interpreted):
    optimizer, _ = optimizer_of(10, 3)
    optimizer.step(zero_grad=True)
    assert names(launches) == ["advance", "update"]


def two_signatures(n_groups):
    """Twice as many tensors as groups, of two dtypes in each."""
    params = parameters([(3,)] * n_groups) + parameters([(3,)] * n_groups, torch.bfloat16)
    give_gradients(params, 0)
    return [{"params": params[i::n_groups], "lr": 0.001 * (i + 1)} for i in range(n_groups)], params


@pytest.mark.parametrize("n_groups", [1, 300])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_two_dtype_signatures_take_one_upload_one_advance_and_two_updates(
    launches, uploads, options, n_groups, interpreted
):
    groups, params = two_signatures(n_groups)
    optimizer = Adam(groups, backend="triton", **options)
    for seed in range(3):
        launches.clear()
        uploads.clear()
        give_gradients(params, seed)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        optimizer.step()
        assert len(uploads) == 1
        assert Counter(names(launches)) == {"advance": 1, "update": 2, **({"norm": 2} if options else {})}


def test_nothing_is_uploaded_while_nothing_changes(launches, uploads, interpreted):
    optimizer, params = optimizer_of(20, 3)
    optimizer.step()
    uploads.clear()
    for _ in range(3):
        optimizer.step()
    assert uploads == []
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    optimizer.step()
    give_gradients(params, 1)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
        group["betas"] = (0.8, 0.9)
    give_gradients(params, 2)
    optimizer.step()
    assert len(uploads) == 3


@pytest.mark.parametrize("capturable", [False, True])
def test_memory_is_reserved_for_graphs_only_where_steps_may_be_captured(
    launches, monkeypatch, capturable, interpreted
):
    reserved = []
    monkeypatch.setattr(DeviceTable, "expect_capture", lambda table, name: reserved.append(name))
    optimizer, _ = optimizer_of(3, 1, capturable=capturable)
    optimizer.step()
    assert reserved == ["grads"] * capturable


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("returns", [False, True])
def test_gradients_behind_an_interrupted_write_are_read(returns, is_written, monkeypatch, interpreted):
    optimizer, params = optimizer_of(2, 1, numel=3)
    optimizer.step()
    before, write = [param.grad for param in params], DeviceTable.write

    def interrupted(*args):
        if is_written:
            write(*args)
        raise KeyboardInterrupt

    give_gradients(params, 1)
    with monkeypatch.context() as patch:
        patch.setattr(DeviceTable, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    for param, grad in zip(params, before, strict=True):
        param.grad = grad if returns else param.grad
    same = twin(optimizer)
    for each in (optimizer, same):
        each.step()
    assert everything(same) == everything(optimizer)


def holds_addresses(operand):
    """Whether an operand is a tensor of addresses: the host made them, and they live there."""
    return isinstance(operand, torch.Tensor) and operand.dtype == torch.int64


class NoHostReads(TorchDispatchMode):
    """Fails on whatever brings an element of a tensor to the host."""

    FORBIDDEN = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not all(map(holds_addresses, args)):
            assert function.name() not in self.FORBIDDEN, f"{function.name()} reads a value from the device"
        return function(*args, **(kwargs or {}))


def test_a_step_reads_no_value_of_a_tensor(launches, monkeypatch, interpreted):
    optimizer, params = optimizer_of(10, 3, max_grad_norm=1.0, skip_nonfinite=True, ema_decay=0.9)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    for reader in ("item", "tolist", "numpy", "cpu", "__float__", "__bool__", "__int__", "__array__"):
        read = getattr(torch.Tensor, reader)
        monkeypatch.setattr(
            torch.Tensor,
            reader,
            lambda tensor, read=read: (
                read(tensor) if holds_addresses(tensor) else pytest.fail("a value of a tensor was read")
            ),
        )
    with NoHostReads():
        optimizer.step()
        give_gradients_unread(params)
        optimizer.step(zero_grad=True)
        optimizer.sum_grad()
        give_gradients_unread(params)
        optimizer.sum_grad()
        optimizer.step()
    updates = Counter(constants["SPEC"].algorithm for name, *_, constants in launches if name == "update")
    assert updates == {"adam": 3, "accumulate": 1}


def give_gradients_unread(params):
    for param in params:
        param.grad = torch.ones_like(param)


def test_the_guard_against_host_reads_sees_one():
    with NoHostReads(), pytest.raises(AssertionError, match="reads a value"):
        float(torch.ones(()))


def specialisation(recorded):
    """What triton compiles a kernel for: compile-time constants, and of each pointer its dtype and alignment."""
    name, _, pointers, constants = recorded
    assert all(isinstance(pointer, torch.Tensor | None) for pointer in pointers), "an argument is no pointer"
    return (
        name,
        # What is absent is a constant to triton.
        tuple(None if p is None else (p.dtype, p.data_ptr() % 16 == 0) for p in pointers),
        tuple(sorted(constants.items(), key=str)),
    )


VARIATIONS = [
    {"lr": 0.0}, {"lr": 1.0}, {"lr": 7}, {"weight_decay": 0}, {"weight_decay": 1}, {"weight_decay": 16.0},
    {"betas": (0.0, 0.0)}, {"betas": (0.5, 0.99)}, {"eps": 0.0}, {"eps": 1}, {"maximize": True},
    {"decoupled_weight_decay": True}, {"epsilon_hat": False}, {"clip_value": 1.0}, {"grad_scale": 2.0},
]  # fmt: skip


def test_after_the_second_step_no_number_compiles_anything(launches, interpreted):
    optimizer, params = optimizer_of(3, 1)
    optimizer.step()
    optimizer.step()
    compiled = set(map(specialisation, launches))
    assert len(compiled) == 2
    for options in VARIATIONS:
        optimizer.param_groups[0].update(options)
        optimizer.step()
    for numel in (0, 1, 2, 15, 16, 17, 1023, 1025):
        for n_tensors in (1, 2, 16, 17):
            optimizer_of(n_tensors, 1, numel=numel)[0].step()
    params[1].grad = None
    optimizer.step()
    unaligned = torch.nn.Parameter(torch.zeros(18)[1:])
    unaligned.grad = torch.ones(17)
    optimizer.add_param_group({"params": [unaligned]})
    optimizer.step()
    assert set(map(specialisation, launches)) == compiled


@pytest.mark.gpu
def test_nothing_is_compiled_after_the_second_step(device):
    import triton

    params = parameters([(17,), (1,), (64,)], device=str(device))
    give_gradients(params, 0)
    optimizer = Adam(params, backend="triton")
    optimizer.step()
    optimizer.step()
    compiled = []

    def hook(*_, fn, **__):
        compiled.append(fn.name)
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
        for options in VARIATIONS:
            optimizer.param_groups[0].update(options)
            optimizer.step()
        for n_tensors in (1, 2, 16, 17):
            others = parameters([(n_tensors,)] * n_tensors, device=str(device))
            give_gradients(others, 1)
            Adam(others, backend="triton").step()
    assert compiled == []


def calls_of_a_step(n_tensors, n_groups, **options):
    """How many functions, of Python and of C, one step calls when nothing has changed."""
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(n_tensors)]
    each = -(-n_tensors // n_groups)
    groups = [{"params": params[i : i + each], "lr": 1e-3} for i in range(0, n_tensors, each)]
    optimizer = Adam(groups, **options)
    give_gradients(params, 0)
    for _ in range(3):
        optimizer.step()
    calls = Counter()
    sys.setprofile(lambda frame, event, arg: calls.update([event]))
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return calls["call"] + calls["c_call"]


@pytest.mark.parametrize("options", [{}, {"flatten": True}, {"max_grad_norm": 1e9}], ids=["plain", "flat", "norm"])
@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("n_groups", [1, 40])
def test_the_calls_of_a_step_do_not_grow_with_the_tensors(backend, n_groups, options, launches, interpreted):
    few, many = (calls_of_a_step(n_tensors, n_groups, backend=backend, **options) for n_tensors in (80, 160))
    # A flat buffer takes some calls of its own, and each group has one: 1,204 calls for 40 of them.
    assert many == few < 540 + 17 * n_groups

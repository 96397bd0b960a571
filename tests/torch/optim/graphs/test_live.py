"""Graphs of a step: each replay is one step with the hyperparameters of that moment."""

import copy
import io
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam, AdamW
from dragon.vm.torch.optim._backends.context import DeviceContext
from dragon.vm.torch.optim._graphs.live import LiveGroup
from dragon.vm.torch.optim._plan import widening

from ..judging import judged_step, make_params, params_of, same_bits, set_grads, snapshots
from ..recorded import RecordedGraph


def make(where: torch.device, kind: Any = Adam, **options: Any) -> Any:
    """An optimizer after its first step, with gradients that stay where they are."""
    torch_epsilon = {} if kind is SGD else {"epsilon_hat": False}
    options = {"lr": 0.1, "backend": "triton", "capturable": True, **torch_epsilon, **options}
    optimizer = kind(make_params(device=where), **options)
    set_grads(params_of(optimizer), 0)
    optimizer.step()
    return optimizer


def new_values(optimizer: Any, number: int) -> None:
    """Other gradients, in the same memory."""
    for param in params_of(optimizer):
        if param.grad is not None:
            param.grad.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(number)))


def set_rate(group: Any, number: int) -> None:
    group["lr"] = 0.1 / number


def set_betas(group: Any, number: int) -> None:
    group["betas"] = (0.9 / number, 0.99 / number)


def set_several(group: Any, number: int) -> None:
    group.update(weight_decay=0.1 * number, eps=1e-3 * number)


def merge(group: Any, number: int) -> None:
    group |= {"weight_decay": 0.0, "grad_scale": 1.0 / number}


def replace_by_tensor(group: Any, number: int) -> None:
    where = group["params"][0].device
    group["lr"] = 0.1 / number if where.type == "cpu" else torch.tensor(0.1 / number, device=where)


def delete(group: Any, number: int) -> None:
    group["grad_scale"] = 0.5
    del group["grad_scale"]


def pop(group: Any, number: int) -> None:
    group["clip_value"] = 0.1
    assert (group.popitem() if number == 2 else ("clip_value", group.pop("clip_value"))) == ("clip_value", 0.1)


def set_missing(group: Any, number: int) -> None:
    group.pop("grad_scale", None)
    group.setdefault("grad_scale", 1.0 / number)


CHANGES = [set_rate, set_betas, set_several, merge, replace_by_tensor, delete, pop, set_missing]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_a_replay_has_the_numbers_of_its_moment(graphed: Any, kind: Any, change: Callable[..., None]) -> None:
    where, capture = graphed
    optimizer = make(where, kind)
    replay = capture(optimizer.step)
    for number in (1, 2, 3):
        change(optimizer.param_groups[0], number)
        new_values(optimizer, number)
        judged_step(optimizer, replay)


def test_schedulers_drive_a_graph(graphed: Any) -> None:
    where, capture = graphed
    optimizer = make(where, betas=(0.85, 0.99))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=8)
    optimizer.step()
    replay = capture(optimizer.step)
    rates = set()
    for number in range(4):
        new_values(optimizer, number)
        judged_step(optimizer, replay)
        rates.add((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
        scheduler.step()
    assert len(rates) == 4


def test_each_group_has_its_numbers(graphed: Any) -> None:
    where, capture = graphed
    first, *others = make_params(device=where)
    optimizer = AdamW(
        [{"params": [first], "lr": 0.3}, {"params": others}], backend="triton", capturable=True, epsilon_hat=False
    )
    set_grads(params_of(optimizer), 0)
    optimizer.step()
    replay = capture(optimizer.step)
    optimizer.param_groups[1]["weight_decay"] = 0.5
    judged_step(optimizer, replay)
    optimizer.param_groups[0]["lr"] = 0.01
    judged_step(optimizer, replay)


def test_a_graph_of_some_gradients_leaves_the_others_alone(graphed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widening, "N_MISSED", 1)
    where, capture = graphed
    optimizer = make(where)
    others = params_of(optimizer)[1:]
    kept = [param.grad for param in others]
    for param in others:
        param.grad = None
    optimizer.step()
    plan = optimizer._updater.plans.latest()[-1]
    assert len(plan.gatherer.positions) == 1 + len(others)
    replay = capture(optimizer.step)
    # Other sets of gradients would number partial norms anew, which the graph reads: it serves this one alone.
    assert optimizer._updater.plans.latest()[-1] is plan
    for number in (1, 2):
        new_values(optimizer, number)
        judged_step(optimizer, replay)
    for param, grad in zip(others, kept, strict=True):
        param.grad = grad
    judged_step(optimizer)
    assert [float(optimizer.state[param]["step"]) for param in params_of(optimizer)] == [5.0, *[2.0] * len(others)]


def test_steps_between_replays_leave_the_graph_alone(graphed: Any) -> None:
    where, capture = graphed
    optimizer = make(where)
    replay = capture(optimizer.step)
    captured = [param.grad for param in params_of(optimizer)]
    for number in range(12):
        # More sets of parameters with a gradient than are kept, with gradients elsewhere.
        for index, param in enumerate(params_of(optimizer)):
            param.grad = torch.randn_like(param) if number + 1 & 1 << index else None
        judged_step(optimizer)
    for param, grad in zip(params_of(optimizer), captured, strict=True):
        param.grad = grad
    optimizer.param_groups[0]["lr"] = 0.03
    new_values(optimizer, 5)
    judged_step(optimizer, replay)


@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 0.5}, {"clip_norm": 0.3}, {"skip_nonfinite": True}, {"ema_decay": 0.9}, {"flatten": True}],
    ids=str,
)
def test_a_replay_is_bit_by_bit_a_step(graphed: Any, options: dict[str, Any]) -> None:
    where, capture = graphed
    stepped, replayed = make(where, AdamW, **options), make(where, AdamW, **options)
    stepped.step(zero_grad=True)
    replayed.step(zero_grad=True)
    replay = capture(lambda: replayed.step(zero_grad=True))
    for number in (1, 2):
        for optimizer in (stepped, replayed):
            optimizer.param_groups[0]["lr"] = 0.1 * number
            new_values(optimizer, number)
        stepped.step(zero_grad=True)
        replay()
        assert same_bits(snapshots(stepped), snapshots(replayed))
        assert not any(param.grad.any() for param in params_of(replayed))


def test_sgd_is_live_too(graphed: Any) -> None:
    where, capture = graphed
    stepped, replayed = make(where, SGD, momentum=0.9), make(where, SGD, momentum=0.9)
    replay = capture(replayed.step)
    for number in (1, 2):
        for optimizer in (stepped, replayed):
            optimizer.param_groups[0].update(lr=0.1 * number, momentum=0.5, weight_decay=0.2)
            new_values(optimizer, number)
        stepped.step()
        replay()
        assert same_bits(
            [param.detach() for param in params_of(stepped)], [param.detach() for param in params_of(replayed)]
        )


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}], ids=str)
def test_a_graph_holds_no_upload_of_hyperparameters(options: dict[str, Any], device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("a graph is captured rather than recorded")
    optimizer = make(device, **options)
    graph = RecordedGraph()
    graph.capture(optimizer.step)
    expected = ["upload", *(["norm"] if options else []), "advance", "update"]
    assert graph.names == expected


def test_a_number_may_not_change_within_a_capture(graphed: Any) -> None:
    where, capture = graphed
    optimizer = make(where)

    def train() -> None:
        # PyTorch warns of a graph without a launch.
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.2

    with pytest.raises(RuntimeError, match="cannot change within a capture"):
        capture(train)


def test_a_number_changed_unseen_is_not_captured(device: torch.device) -> None:
    optimizer = make(device)
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.2}
    with pytest.raises(RuntimeError, match="hyperparameters changed unseen since the last one"):
        RecordedGraph().capture(optimizer.step)
    judged_step(optimizer)
    RecordedGraph().capture(optimizer.step)


def test_a_first_step_is_not_captured(device: torch.device) -> None:
    optimizer = make(device)
    optimizer.load_state_dict(optimizer.state_dict())
    before = snapshots(optimizer)
    with pytest.raises(RuntimeError, match="a first step with these parameters, gradients, states and arguments"):
        RecordedGraph().capture(optimizer.step)
    assert same_bits(snapshots(optimizer), before)


def test_copies_and_dicts_hold_plain_groups(device: torch.device) -> None:
    optimizer = make(device)
    group = optimizer.param_groups[0]
    assert isinstance(group, dict)
    for copied in (copy.copy(group), copy.deepcopy(group), pickle.loads(pickle.dumps(group)), group.copy()):
        assert isinstance(copied, dict)
        assert not isinstance(copied, LiveGroup)
        assert copied.keys() == group.keys()
    assert type(optimizer.state_dict()["param_groups"][0]) is dict


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_the_optimizer_is_live_on_its_own(duplicate: Any, graphed: Any) -> None:
    where, capture = graphed
    optimizer = make(where)
    replay = capture(optimizer.step)
    other = duplicate(optimizer)
    set_grads(params_of(other), 1)
    judged_step(other)
    replay_other = capture(other.step) if where.type != "cpu" else RecordedGraph().capture(other.step)
    optimizer.param_groups[0]["lr"] = 0.01
    judged_step(other, replay_other)
    other.param_groups[0]["lr"] = 0.7
    judged_step(optimizer, replay)
    judged_step(other, replay_other)


def test_loading_keeps_the_groups_live(graphed: Any) -> None:
    where, capture = graphed
    optimizer = make(where)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    replay = capture(optimizer.step)
    optimizer.param_groups[0]["lr"] = 0.01
    judged_step(optimizer, replay)


def test_what_is_no_number_is_refused_where_it_is_written(device: torch.device) -> None:
    optimizer = make(device)
    with pytest.raises(TypeError, match="lr must be a number, but got 'fast'"):
        optimizer.param_groups[0]["lr"] = "fast"


def test_eager_steps_follow_numbers_that_return(device: torch.device) -> None:
    results = []
    for capturable in (False, True):
        lr = torch.tensor(0.1)
        optimizer = make(device, lr=lr, capturable=capturable)
        lr.fill_(1.0)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        lr.fill_(0.1)
        optimizer.step()
        results.append(snapshots(optimizer))
    assert same_bits(*results)


def test_rows_belong_to_groups_whatever_their_order(graphed: Any) -> None:
    where, capture = graphed
    first, *others = make_params(device=where)
    groups = [{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.2}]
    optimizer = Adam(groups, backend="triton", capturable=True)
    set_grads(params_of(optimizer), 0)
    optimizer.step()
    replay = capture(optimizer.step)
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["lr"] = 0.0
    before = [param.detach().clone() for param in (first, *others)]
    replay()
    stayed = [bool((param == old).all()) for param, old in zip((first, *others), before, strict=True)]
    assert stayed == [False, True, True, True]


@pytest.mark.parametrize("flatten", [False, True])
def test_groups_made_capturable_later_are_live(flatten: bool, graphed: Any) -> None:
    where, capture = graphed
    optimizer = make(where, capturable=False, flatten=flatten)
    for group in optimizer.param_groups:
        group["capturable"] = True
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.02
    replay = capture(optimizer.step)
    assert optimizer.param_groups[0].setdefault("initial_lr", 0.1) == 0.1
    assert "initial_lr" in optimizer.param_groups[0]
    optimizer.param_groups[0]["lr"] = 0.01
    judged_step(optimizer, replay)
    grads = [param.grad for param in params_of(optimizer)]
    params_of(optimizer)[0].grad = None
    judged_step(optimizer)
    params_of(optimizer)[0].grad = grads[0]
    judged_step(optimizer, replay)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", torch.tensor(0.5)),
        ("weight_decay", torch.tensor(0.5)),
        ("eps", torch.tensor(0.5)),
        ("betas", (torch.tensor(0.5), torch.tensor(0.6))),
        ("betas", [torch.tensor(0.5), torch.tensor(0.6)]),
    ],
)
def test_a_tensor_that_a_graph_would_not_see_is_refused_and_not_kept(name: str, value: Any, graphed: Any) -> None:
    where, capture = graphed
    optimizer = make(where)
    capture(optimizer.step)
    before = dict(optimizer.param_groups[0])
    with pytest.raises(RuntimeError, match=f"{name} is a tensor on the CPU"):
        optimizer.param_groups[0].update({name: value, "maximize": True})
    assert dict(optimizer.param_groups[0]) == before


def test_sums_within_a_graph_are_part_of_each_replay(graphed: Any) -> None:
    where, capture = graphed
    stepped, replayed = make(where), make(where)

    def train(optimizer: Any, grads: list[torch.Tensor]) -> None:
        for factor in (1.0, 2.0):
            for param, grad in zip(params_of(optimizer), grads, strict=True):
                param.grad = grad * factor
            optimizer.sum_grad()
        optimizer.step()

    grads = [torch.randn_like(param) for param in params_of(stepped)]
    for optimizer in (stepped, replayed):
        train(optimizer, grads)
    if where.type == "cpu":
        pytest.skip("what torch computes within a capture is not recorded")
    replay = capture(lambda: train(replayed, grads))
    train(stepped, grads)
    replay()
    assert same_bits(snapshots(stepped), snapshots(replayed))


def test_saved_groups_are_read_without_trust(device: torch.device) -> None:
    file = io.BytesIO()
    torch.save(make(device).param_groups, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)[0]["lr"] == 0.1
    group = make(device).param_groups[0]
    assert type(group)({"lr": 1.0}) == {"lr": 1.0}


def test_steps_and_uploads_wait_for_each_other_whatever_their_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    event = SimpleNamespace(record=lambda: log.append("record"), wait=lambda: log.append("wait"))
    monkeypatch.setattr(torch, "Event", lambda device: event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: "captured" in log)
    context = DeviceContext(torch.device("cpu"))
    context.device, context._module = torch.device("cuda", 0), torch.cuda
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for work in ("step", "upload"):
        context.launch(lambda work=work: log.append(work), in_order=True)
    log.append("captured")
    context.launch(lambda: log.append("step"), in_order=True)
    assert log == ["step", "record", "wait", "upload", "record", "captured", "step"]

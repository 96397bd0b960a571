"""Scenarios: states of memory modes are saved, resharded, and passed on to other modes and to PyTorch."""

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.optim import ZeroRedundancyOptimizer

from .factories import whole
from .memory import MODES, N_STEPS, Alone, Run, _built, ddp, differing

# The native form or PyTorch's, and flat or nested dicts. A flat one is refused in PyTorch's form.
FORMS = {"nested": (False, False), "native": (True, False), "native flat": (True, True)}


class OfTorch(Run):
    """The same model with PyTorch's optimizer."""

    def __init__(self, kind: str, mode: str) -> None:
        super().__init__(kind, mode, "eager")
        groups = [{"params": group["params"]} for group in self.optimizer.param_groups]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)


def dicts(model: nn.Module, optimizer: Any, **options: Any) -> dict[str, Any]:
    how = StateDictOptions(**options)
    return {
        "model": get_model_state_dict(model, options=how),
        "optim": get_optimizer_state_dict(model, optimizer, options=how),
    }


def load(run: Run, state: dict[str, Any], **options: Any) -> None:
    how = StateDictOptions(**options)
    set_model_state_dict(run.model, state["model"], options=how)
    set_optimizer_state_dict(run.model, run.optimizer, state["optim"], options=how)


def save(kind: str, modes: list[str], folder: str, name: str) -> None:
    """Train two steps in each mode and save them in each form."""
    for mode in modes:
        for form, (is_native, is_flat) in FORMS.items():
            run = Run(kind, mode, name, native_state_dict=is_native)
            run.train(range(2))
            state = dicts(run.model, run.optimizer, flatten_optimizer_state_dict=is_flat)
            dcp.save(state, checkpoint_id=f"{folder}/{mode} {form}")


def resume(kind: str, modes: list[str], folder: str, name: str, parts: list[int]) -> dict[str, list[str]]:
    """For each mode and form of these parts, of two, what differs from an uninterrupted run in one process."""
    found = {}
    for number, mode in enumerate(modes):
        for place, (form, (is_native, is_flat)) in enumerate(FORMS.items()):
            if (number + place) % 2 not in parts:
                continue
            run = Run(kind, mode, name, native_state_dict=is_native)
            state = dicts(run.model, run.optimizer, flatten_optimizer_state_dict=is_flat)
            dcp.load(state, checkpoint_id=f"{folder}/{mode} {form}")
            load(run, state, flatten_optimizer_state_dict=is_flat)
            run.train(range(2, N_STEPS))
            alone = Alone(run)
            alone.train(range(N_STEPS))
            found[f"{mode} {form}"] = differing(run.everything(), alone.everything())
    return found


def whole_dicts(kind: str, modes: list[str], name: str) -> dict[str, list[str]]:
    """What differs after full dicts, loaded everywhere and from the first process, in both forms."""
    found = {}
    for number, mode in enumerate(modes):
        for is_native in (False, True):
            # Each pair of a mode, a form and a way to load is among them.
            is_from_first = is_native == (number % 2 == 0)
            run, fresh = (Run(kind, mode, name, native_state_dict=is_native) for _ in range(2))
            run.train(range(1))
            for group in run.optimizer.param_groups:
                group["betas"] = (0.8, 0.99)
            run.train(range(1, 2))
            # PyTorch's own load would share the step counters of the running optimizer.
            state = copy.deepcopy(dicts(run.model, run.optimizer, full_state_dict=True, cpu_offload=is_from_first))
            load(fresh, state, full_state_dict=True, broadcast_from_rank0=is_from_first)
            for each in (run, fresh):
                each.train(range(2, N_STEPS))
            found[f"{mode} {is_native}"] = differing(fresh.everything(), run.everything())
    return found


def save_one(kind: str, mode: str, folder: str, name: str) -> None:
    """Train two steps and save; "torch" is PyTorch's optimizer."""
    run = OfTorch(kind, mode) if name == "torch" else Run(kind, mode, name)
    run.train(range(2))
    dcp.save(dicts(run.model, run.optimizer), checkpoint_id=folder)


def load_in_other_mode(kind: str, source: str, target: str, folder: str, saver: str, loader: str) -> list[str]:
    """What differs from one process that loads the source's state dict in the target mode."""
    run = OfTorch(kind, target) if loader == "torch" else Run(kind, target, loader)
    state = dicts(run.model, run.optimizer)
    dcp.load(state, checkpoint_id=folder)
    load(run, state)
    before, after = _alone(kind, source, saver), _alone(kind, target, loader)
    before.train(range(2))
    # PyTorch's loader would share the step counters.
    after.optimizer.load_state_dict(copy.deepcopy(before.optimizer.state_dict()))
    with torch.no_grad():
        for mine, theirs in zip(after.params, before.params, strict=True):
            mine.copy_(theirs)
    for each in (run, after):
        each.train(range(2, N_STEPS))
    found, expected = run.everything(), after.everything()
    if loader != "torch":
        return differing(found, expected)
    # DCP does not ask for entries that PyTorch's optimizer has not; its operations round shards otherwise.
    differ = []
    for key, value in found.items():
        wide = expected[key].float()
        # Squares of gradients are far smaller than parameters.
        floor = 1e-5 * float(wide.abs().max()) if wide.numel() else 0.0
        if not torch.allclose(entire(value).float(), wide, atol=floor):
            differ.append(key)
    return differ


def entire(tensor: Any) -> Tensor:
    """As `whole`; gloo has no 16-bit integers."""
    return whole(tensor.int()).short() if tensor.dtype == torch.int16 else whole(tensor)


def _alone(kind: str, mode: str, name: str) -> Run:
    alone = Alone(Run(kind, mode, "eager" if name == "torch" else name))
    if name == "torch":
        alone.optimizer = torch.optim.AdamW(alone.params, lr=1e-2)
    return alone


def masters_of_a_partial_load(kind: str, mode: str, folder: str, name: str) -> float:
    """How far weights move in a step of lr 0 after a load of a file that has no masters."""
    run = Run(kind, mode, name, lr=0.0, weight_decay=0.0)
    state = dicts(run.model, run.optimizer)
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    load(run, state)
    for group in run.optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    before = [param.detach().clone() for param in run.params]
    run.train(range(1))
    pairs = zip(run.params, before, strict=True)
    moved = [(a.detach() - b).abs() for a, b in pairs]
    return max(float((m.full_tensor() if hasattr(m, "full_tensor") else m).max()) for m in moved)


def loaded_in_place(kind: str, mode: str, folder: str, name: str) -> tuple[float, float]:
    """How far weights are from those of a file after a load of the model's dict alone and a step of lr 0.

    Twice: the second time the state was asked for before the step.
    """
    run = Run(kind, mode, name)
    run.train(range(1))
    dcp.save({"model": get_model_state_dict(run.model)}, checkpoint_id=folder)
    saved = [param.detach().clone() for param in run.params]
    found = []
    for is_first in (True, False):
        run.train(range(1, 3))
        model, _ = get_state_dict(run.model, run.optimizer)
        dcp.load({"model": model}, checkpoint_id=folder)
        if not is_first:
            # Whoever asks for the state again gets the masters of the file's weights.
            run.optimizer.state_dict()
        rates = [group["lr"] for group in run.optimizer.param_groups]
        for group in run.optimizer.param_groups:
            group["lr"] = 0.0
        run.train(range(1))
        for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        pairs = zip(run.params, saved, strict=True)
        moved = [(a.detach() - b).abs() for a, b in pairs]
        found.append(max(float((m.full_tensor() if hasattr(m, "full_tensor") else m).max()) for m in moved))
    return found[0], found[1]


def flat_dict(kind: str, mode: str) -> str:
    """What is said of a flat dict in PyTorch's form."""
    run = Run(kind, mode, "eager")
    run.train(range(1))
    try:
        dicts(run.model, run.optimizer, flatten_optimizer_state_dict=True)
    except RuntimeError as error:
        return str(error)
    return "accepted"


def resumed_by_zero(modes: list[str], name: str) -> dict[str, tuple[bool, list[str]]]:
    """For each mode and form whether weights are an uninterrupted run's, and entries that only one of them has."""
    found = {}
    for mode in modes:
        for is_native in (False, True):
            (model, optimizer), (fresh, resumed) = (_zero(mode, name, is_native) for _ in range(2))
            _train_zero(model, optimizer, range(2))
            _train_zero(fresh, resumed, range(5, 6))
            optimizer.consolidate_state_dict(to=0)
            state = [copy.deepcopy(optimizer.state_dict()) if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(state)
            fresh.load_state_dict(model.state_dict())
            resumed.load_state_dict(state[0])
            for each in ((model, optimizer), (fresh, resumed)):
                _train_zero(*each, range(2, N_STEPS))
            is_same = all(map(torch.equal, model.parameters(), fresh.parameters()))
            keys = [{key for held in each.optim.state.values() for key in held} for each in (optimizer, resumed)]
            found[f"{mode} {is_native}"] = is_same, sorted(keys[0] ^ keys[1])
    return found


def _zero(mode: str, name: str, is_native: bool) -> tuple[nn.Module, Any]:
    dtype, options = MODES[mode]
    model = ddp(dtype)
    built = partial(_built, **{"backend": name, "native_state_dict": is_native, "lr": 1e-3, **options})
    return model, ZeroRedundancyOptimizer(model.parameters(), built)


def _train_zero(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        inputs: Tensor = torch.randn(6, 64).to(next(model.parameters()).dtype)
        model(inputs).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

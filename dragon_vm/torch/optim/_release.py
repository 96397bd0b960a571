"""Gradient release: parameters are updated in the backward pass, and their gradients freed, bucket by bucket."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from dragon.vm.torch.optim._distributed.lanes import has_others
from dragon.vm.torch.optim._distributed.owners import Replicas
from dragon.vm.torch.optim._distributed.shards import mean_shard_nbytes
from dragon.vm.torch.optim._gradients.reporting import ScalerReport
from dragon.vm.torch.optim._groups.members import MemberReader, Members
from dragon.vm.torch.optim._modes import undisturbed
from dragon.vm.torch.optim._options import Settings
from dragon.vm.torch.optim._plan.cache import N_LATEST
from dragon.vm.torch.optim._plan.updater import Updater

# Enough elements for kernels to run at full speed, few enough that their gradients do not count.
BUCKET_BYTES = 8 * 2**20

_INSTEAD = {
    "max_grad_norm": "all gradients are never there at once; use clip_norm or clip_value",
    "skip_nonfinite": "the first update comes before the last gradient; use a GradScaler",
    "flatten": "a buffer needs all its gradients at once",
}


def check_release(groups: Sequence[Mapping[str, Any]], settings: Settings) -> None:
    """Check that gradients can be released, if `release_gradients` asks for it."""
    release = settings.release_gradients
    if not isinstance(release, bool | torch.amp.GradScaler):
        raise TypeError(f"release_gradients must be a bool or a GradScaler, but got {release!r}")
    if release is False:
        return
    for name, reason in _INSTEAD.items():
        if value := getattr(settings, name):
            raise ValueError(f"release_gradients with {name}={value}: {reason}")
    if has_others(settings.process_group):
        raise ValueError(
            "release_gradients with process_group: its processes release other buckets at other times, and cannot "
            "agree on them. Use DTensor parameters without process_group, or leave release_gradients out"
        )
    if any(group.get("differentiable") for group in groups):
        raise ValueError("release_gradients with differentiable=True: a backward pass cannot see its own update")
    params = [param for group in groups for param in group["params"]]
    if any(map(torch.nn.parameter.is_lazy, params)):
        raise ValueError("release_gradients with parameters that have no shape yet: call the model once before")
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        raise ValueError(
            "release_gradients with FullyShardedDataParallel: its hooks run before the reduction. "
            "Use FSDP2's fully_shard"
        )


class Bucket:
    """Parameters that are updated together. Those that are taken out of the optimizer's groups are not held.

    Args:
        index: its number, from 1.
        chosen: the parameters, in reverse order, each behind the index of its group.
        n_groups: number of parameter groups.
    """

    def __init__(self, index: int, chosen: Sequence[tuple[int, Tensor]], n_groups: int) -> None:
        self.index = index
        self._references: list[list[TensorWeakRef]] = [[] for _ in range(n_groups)]
        for group_index, param in reversed(chosen):
            self._references[group_index].append(TensorWeakRef(param))
        self.ids = {id(param) for _, param in chosen}
        self._reader = MemberReader()
        self.begin()

    @property
    def is_whole(self) -> bool:
        """Whether none of its parameters is gone, whose id another may have now."""
        return len(self.params) == len(self.ids)

    @property
    def params(self) -> list[Tensor]:
        """All its parameters that are there."""
        return [param for references in self._references for param in _living(references)]

    def members(self) -> Members:
        """The parameters and their gradients."""
        return self._reader.read([{"params": _living(references)} for references in self._references])

    def begin(self) -> None:
        """Wait for all gradients anew."""
        self.waiting, self.done = set(self.ids), set[int]()


def _living(references: Sequence[TensorWeakRef]) -> list[Tensor]:
    return [param for reference in references if (param := reference()) is not None]


# For each parameter with a release: all of them, and the later optimizers without, which may be gone; latest last.
_deciders: MutableMapping[Tensor, list[weakref.ref[Any]]] = WeakIdKeyDictionary()


def keep_gradients(groups: Sequence[Mapping[str, Any]], optimizer: object) -> None:
    """Leave gradients to an optimizer that releases none, while it is there, where an earlier one would."""
    for param in (param for group in groups for param in group["params"] if param in _deciders):
        _deciders[param] = [*_living_deciders(param), weakref.ref(optimizer)]


def _living_deciders(param: Tensor) -> list[weakref.ref[Any]]:
    return [each for each in _deciders.get(param, ()) if each() is not None]


class GradientRelease:
    """The buckets of one optimizer, and the hooks that update them on the backward pass's thread and stream.

    Of several optimizers of a parameter the latest decides about its gradient, while it is there.

    Args:
        optimizer: it reads and checks its groups with `_read_groups`. Its `release_gradients` is the `GradScaler`
            whose scale the gradients have; True if they have none.

    Attributes:
        report: what a `GradScaler` is to find.
    """

    def __init__(self, optimizer: Any) -> None:
        scaler = optimizer._settings.release_gradients
        # The hooks must not keep the optimizer alive.
        self._optimizer = weakref.ref(optimizer)
        self._updater: Updater = optimizer._updater
        self.report = ScalerReport(None if scaler is True else scaler)
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[int, Bucket] = {}
        self._handles = WeakIdKeyDictionary()
        weakref.finalize(self, _remove, self._handles).atexit = False
        # The ids of each group's parameters at the last pass.
        self._arranged: list[list[tuple[int, bool]]] = []
        # Whether some gradient has arrived since the last step.
        self._n_passes, self._is_under_way = 0, False
        # One thread a device runs backward passes.
        self._lock = threading.RLock()

    def watch(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Arrange the trained parameters of groups in buckets, in reverse order, and hook them."""
        chosen: list[list[tuple[int, Tensor]]] = []
        nbytes = 0.0
        ordered = [(index, param) for index, group in enumerate(groups) for param in group["params"]]
        for index, param in reversed([each for each in ordered if each[1].requires_grad]):
            # Processes whose shards differ must arrange the same buckets.
            size = mean_shard_nbytes(param)
            if not chosen or nbytes + size > BUCKET_BYTES or param.device != chosen[-1][-1][1].device:
                chosen.append([])
                nbytes = 0.0
            chosen[-1].append((index, param))
            nbytes += size
        # Of what is there still: another may have the id of what is gone.
        are_done = {id(param) for bucket in self._buckets for param in bucket.params if id(param) in bucket.done}
        self._buckets = [Bucket(number, each, len(groups)) for number, each in enumerate(chosen, 1)]
        self._bucket_of = {key: bucket for bucket in self._buckets for key in bucket.ids}
        for bucket in self._buckets:
            bucket.done = bucket.ids & are_done
        self._updater.plans.n_kept = N_LATEST + 2 * len(self._buckets)
        reference = weakref.ref(self)

        @_disable_dynamo
        def hook(param: Tensor) -> None:
            release = reference()
            if release is not None and _living_deciders(param)[-1:] == [reference]:
                release._arrived(param)

        left = [param for param in self._handles if id(param) not in self._bucket_of]
        _remove(self._handles, left, self)
        for param in (param for bucket in self._buckets for param in bucket.params):
            if param not in self._handles:
                self._handles[param] = param.register_post_accumulate_grad_hook(hook)
                _deciders[param] = [*_living_deciders(param), reference]

    def begin(self, grad_scale: Tensor | None = None) -> bool:
        """Wait for the gradients of the next backward pass, and tell whether any arrived since the last call.

        `grad_scale` is what a `GradScaler` hands to the step after the last pass.
        """
        if self.report.scaler is None and grad_scale is not None:
            raise RuntimeError(
                "release_gradients=True has updated parameters from gradients that a GradScaler had scaled: "
                "give release_gradients=scaler"
            )
        was_under_way, self._is_under_way = self._is_under_way, False
        for bucket in self._buckets:
            bucket.begin()
        self.report.begin()
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        if not was_under_way and _arrangement(groups) != self._arranged:
            # No hook tells of a pass where all trained parameters are others than those that have one.
            self.watch(groups)
        return was_under_way

    def check_scaler(self, scaler: Any) -> None:
        """Check at the step of a `GradScaler` that it is the one whose scale the gradients were divided by."""
        if self.report.scaler is not None and scaler is not self.report.scaler:
            raise RuntimeError(
                "release_gradients=scaler has updated parameters by the scale of another GradScaler than the one "
                "that steps. Give it the scaler that scales the loss. Copies of an optimizer have the original's: "
                "construct one with the copied scaler, and load state_dict()"
            )

    def _arrived(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        groups = optimizer.param_groups
        with self._lock:
            if not self._is_under_way:
                number = self._n_passes + 1
                # Groups may have lost, gained, frozen or exchanged parameters since the last pass.
                found = _arrangement(groups)
                is_same = found == self._arranged and all(bucket.is_whole for bucket in self._buckets)
                if not is_same:
                    self.watch(groups)
                if not is_same or number.bit_count() == 1:
                    # Now and then, for a model may be wrapped later.
                    self._check_owner()
                    self._arranged = found
                self._n_passes, self._is_under_way = number, True
            bucket = self._bucket_of.get(id(param))
            if bucket is None:
                return
            if id(param) in bucket.done:
                raise RuntimeError(
                    "a second backward pass since the last step(), or a gradient that comes in parts, as with "
                    "checkpoint(use_reentrant=True): release_gradients has updated the parameters already. Call "
                    "step() after each backward pass; gradients cannot be accumulated"
                )
            bucket.waiting.discard(id(param))
            if self.report.scaler is not None and bucket is self._buckets[-1]:
                self.report.tell(bucket.params)
            elif not bucket.waiting:
                self._release(bucket, optimizer)

    def _check_owner(self) -> None:
        params = [param for bucket in self._buckets for param in bucket.params]
        if Replicas(params):
            raise RuntimeError(
                "release_gradients cannot update parameters of DistributedDataParallel, which reduces gradients "
                "after this hook. Use FSDP2's fully_shard"
            )

    def _release(self, bucket: Bucket, optimizer: Any) -> None:
        undisturbed(self._update, bucket, optimizer)
        bucket.done = bucket.ids
        for param in bucket.params:
            param.grad = None
        self.report.tell(self._buckets[-1].params)

    def _update(self, bucket: Bucket, optimizer: Any) -> None:
        optimizer._read_groups()
        members = bucket.members()
        found_inf = self.report.found_inf(members.grads, members.shards[0].device)
        if found_inf is not None and members.are_distributed:
            found_inf = self._updater.agreed(members, found_inf, bucket.index)
        scaling = self.report.scaling(found_inf)
        owned = optimizer.param_groups, optimizer.state
        self._updater.update(members, *owned, scaling, zero_grad=False, part=bucket.index)


def _arrangement(groups: Sequence[Mapping[str, Any]]) -> list[list[tuple[int, bool]]]:
    """The ids of each group's parameters, and which of them are trained."""
    return [[(id(each), each.requires_grad) for each in group["params"]] for group in groups]


def _remove(handles: WeakIdKeyDictionary, params: Sequence[Tensor] | None = None, gone: object = None) -> None:
    """Remove all hooks of a release that is gone, or those of parameters that have left the one given."""
    for param in list(handles) if params is None else params:
        handles.pop(param).remove()
        _deciders[param] = left = [each for each in _living_deciders(param) if each() is not gone]
        # A weak reference that is left would keep `torch.utils.swap_tensors` from the parameter.
        if not any(isinstance(each(), GradientRelease) for each in left):
            del _deciders[param]

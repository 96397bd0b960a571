"""What an optimizer stores and how, the masters of its parameters, and what its steps have found."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from dragon.vm.torch.optim._accumulate import AccumulatingOptimizer
from dragon.vm.torch.optim._algorithms.algorithm import host_number
from dragon.vm.torch.optim._distributed.hidden import is_loading
from dragon.vm.torch.optim._distributed.shards import local
from dragon.vm.torch.optim._formats.resolve import cannot_forget
from dragon.vm.torch.optim._groups.bounds import is_on_device
from dragon.vm.torch.optim._groups.checks import has_memory, is_trained, names_of
from dragon.vm.torch.optim._groups.eligibility import why_slow
from dragon.vm.torch.optim._groups.entries import decode_master, kept_format, unflat
from dragon.vm.torch.optim._groups.masters import resync
from dragon.vm.torch.optim._groups.native import MASTER, MASTER_PARTS
from dragon.vm.torch.optim._groups.storage import options_of, storage_of
from dragon.vm.torch.optim._modes import with_plain_tensors
from dragon.vm.torch.optim._options import complete
from dragon.vm.torch.optim._plan.updater import Updater


class StoringOptimizer(AccumulatingOptimizer):
    """An optimizer that tells what it stores and found, and keeps masters in step with their parameters."""

    _updater: Updater
    # What it has warned of.
    _warned: Collection[str] = ()

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return the state in PyTorch's format, with a "grad_sum" for each parameter whose sum no step has used.

        Own keys of a group are there where they differ from what PyTorch does, or were set to what it does. An
        AMSGrad that was switched on since the last step has its maximum, zero. What is stored in parts is there as
        fp32, one parameter after the other, or as it is if `native_state_dict` says so.

        Raises:
            RuntimeError: for sums of gradients that other processes have parts of, and for flat dicts that
                PyTorch's checkpoint functions could not load.
        """
        if not is_loading():
            # Else a master that `dcp.load` has filled in its place would be lost before it is loaded.
            self._settle_masters()
        self._take_back()
        self._sums.check_reduced()
        # The next step is to write it.
        with_plain_tensors(self._complete_switched_on)
        state_dict = super().state_dict()
        # Checkpoints are loaded into what model and optimizer give away, and nobody may tell the optimizer.
        self._updater.masters.doubt(self._params_with_masters())
        return state_dict

    def state_formats(self) -> dict[str, dict[str, str]]:
        """How each parameter and its states are stored, by its name, or its position if it has none of its own.

        A plain tensor's format is its dtype. Before the first step these are the formats that will be.
        """
        found = {}
        for name, param, group in self._named_params():
            if is_trained(param):
                names, state = self._algorithm.state_keys(group), self.state.get(param, {})
                storage = storage_of(param, group, names)
                found[name] = {"param": storage.param.name}
                found[name] |= {key: kept_format(storage, state, key).name for key in names}
        return found

    @torch.no_grad()
    def master_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and fp32 master of each parameter that has one, one at a time.

        A parameter without a step so far is its own master. A distributed parameter has a distributed master.
        """
        self._settle_masters()
        for name, param, group in self._named_params():
            if group["master_weights"] is not None and is_trained(param):
                state = self.state.get(param, {})
                own = self._own_value(param)
                value = decode_master(own, state)
                yield name, own.detach().float() if value is None else unflat(own, value.clone())

    def resync_master(self) -> None:
        """Make the parameters, as they are now, their own masters.

        Call it after you wrote to them in a way that PyTorch does not count, as through `Tensor.data`. The next
        step notices other writes itself.

        Raises:
            RuntimeError: inside `swap_ema`.
        """
        if self._originals:
            raise RuntimeError("resync_master() was called inside swap_ema(): the averages would become masters")
        resync(self._all_params(), self.state)
        self._updater.masters.note(self._params_with_masters(), self.state)

    # Classes that programs derive may keep something else under these names.
    @property
    def n_skipped_steps(self) -> int:
        """Steps skipped so far for infinite or NaN gradients. Reading it waits for the device."""
        own: int = vars(self).get("n_skipped_steps", self._updater.n_skipped)
        return own

    @n_skipped_steps.setter
    def n_skipped_steps(self, value: Any) -> None:
        vars(self)["n_skipped_steps"] = value

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of scaled, unclipped gradients at the last step that needed it; 0-dim float64, or None before."""
        own: Tensor | None = vars(self).get("grad_norm", self._updater.grad_norm)
        return own

    @grad_norm.setter
    def grad_norm(self, value: Any) -> None:
        vars(self)["grad_norm"] = value

    def memory(self) -> dict[str, int]:
        """Bytes that the tensors of this process take, by kind; the tables of kernels are not among them.

        The kinds are parameters, gradients, sums of gradients, states, masters, averages and counters.
        """
        kinds = ("parameters", "gradients", "sums", "states", "masters", "averages", "counters")
        nbytes = dict.fromkeys(kinds, 0)
        flats = [pair for buffer in self._updater.buffers for pair in buffer.flat_tensors()]
        spans = [(flat.data_ptr(), flat.data_ptr() + flat.nbytes) for _, flat in flats]
        # What lies in a flat buffer is counted with it, and a tensor that stands twice once.
        others = {id(local(tensor)): (key, local(tensor)) for key, tensor in self._kept_tensors()}
        apart = (
            (key, tensor)
            for key, tensor in others.values()
            if not any(start <= tensor.data_ptr() < end for start, end in spans)
        )
        for key, tensor in (*flats, *apart):
            nbytes[_KINDS.get(key, "states")] += tensor.nbytes
        return nbytes

    def _kept_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters, gradients, sums and state tensors, with the keys that they have in states."""
        for _, param, _ in self._named_params():
            if not torch.nn.parameter.is_lazy(param):
                found = {"param": param, "grad": param.grad, **self.state.get(param, {})}
                yield from ((key, value) for key, value in found.items() if isinstance(value, Tensor))
        yield from (("grad_sum", total) for total in self._sums.totals.values())

    def _named_params(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Yield name, parameter, and its group with all options."""
        names = list(chain.from_iterable(map(names_of, self.param_groups)))
        counts = Counter(names)
        # Two models may have the same names. Then a name that is a number could be another parameter's position.
        all_have = None not in counts and len(counts) == len(names)
        groups = [complete(group, self._algorithm.own_defaults) for group in self.param_groups]
        members = ((param, group) for group in groups for param in group["params"])
        for position, (name, (param, group)) in enumerate(zip(names, members, strict=True)):
            is_own = counts[name] == 1 and (all_have or not str(name).isdecimal())
            yield name if name is not None and is_own else str(position), param, group

    def _settle_masters(self) -> None:
        """Make parameters their own masters that somebody wrote to since the last step."""
        # In swap_ema() it is the averages that were written.
        if not self._originals:
            self._updater.masters.notice(self._params_with_masters(), self.state)

    def _params_with_masters(self) -> list[Tensor]:
        groups = [group for group in self.param_groups if group.get("master_weights") is not None]
        return list(chain.from_iterable(group["params"] for group in groups))

    def _warn_of_options(self, group: Mapping[str, Any]) -> None:
        """Warn of each once: a GPU that does without kernels, and second moments that cannot decay."""
        for find in (self._slowness_of, self._rounding_of):
            if find.__name__ not in self._warned and (text := find(group)):
                self._warned = {*self._warned, find.__name__}
                warnings.warn(text, UserWarning, stacklevel=_levels_to_user())

    def _slowness_of(self, group: Mapping[str, Any]) -> str | None:
        # Kernels are for tensors with memory.
        shards = map(local, filter(is_trained, group["params"]))
        devices = {shard.device for shard in filter(has_memory, shards)}
        for device in devices if not group["differentiable"] else ():
            if reason := why_slow(self._settings.backend, device):
                return (
                    f"parameters on {device} are updated by plain torch operations, a tensor at a time, which is "
                    f"far slower than kernels, and than PyTorch's fused=True: {reason}. Give backend='eager' to "
                    "leave it so"
                )
        return None

    def _rounding_of(self, group: Mapping[str, Any]) -> str | None:
        """Second moments that were asked to be rounded such that they cannot decay."""
        if options_of(group).state_dtype is None or "betas" not in group or is_on_device(group["betas"][1]):
            return None
        beta2, names = host_number(group["betas"][1]), self._algorithm.state_keys(group)
        if not any(cannot_forget(storage_of(p, group, names), beta2) for p in filter(is_trained, group["params"])):
            return None
        return (
            f"exp_avg_sq is rounded to nearest in so few bits that with beta2={beta2} it cannot decay: learning "
            "rates stay too small for thousands of steps, and losses are worse. Use "
            'state_dtype={"exp_avg_sq": torch.float32}. For all but float64 parameters, '
            "stochastic_rounding=None does as well"
        )


def _levels_to_user() -> int:
    """How many calls above its caller the code stands that is neither PyTorch's nor this library's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "dragon"):
        frame, level = frame.f_back, level + 1
    return level


_KINDS = {
    **{"param": "parameters", "grad": "gradients", "grad_sum": "sums"},
    **{"step": "counters", "ema": "averages"},
    **dict.fromkeys((*MASTER_PARTS, MASTER), "masters"),
}

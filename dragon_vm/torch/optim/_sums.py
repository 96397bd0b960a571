"""Sums of gradients over several backward passes, in float32 or wider."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dragon.vm.torch.optim._distributed.owners import Replicas
from dragon.vm.torch.optim._distributed.placement import placed_like, ready_grad
from dragon.vm.torch.optim._distributed.shards import distributed_like, local
from dragon.vm.torch.optim._distributed.unreduced import SUM_DTYPES, UnreducedSums, at_once, by_buffer, set_grads
from dragon.vm.torch.optim._graphs.capture import is_capturing
from dragon.vm.torch.optim._groups.checks import are_of_one_kind
from dragon.vm.torch.optim._groups.flattening import Signature
from dragon.vm.torch.optim._groups.layout import in_layout_of, is_dense

if TYPE_CHECKING:
    from dragon.vm.torch.optim._backends.triton import SumLaunch


class GradientSums:
    """The sums of one optimizer by parameter; of a distributed parameter, those of its shard.

    Attributes:
        totals: sums of gradients that are the same on all processes, or of one process alone.
    """

    def __init__(self) -> None:
        self.totals: dict[Tensor, Tensor] = {}
        # Whether some were gathered outside of a capture.
        self.are_outside = False
        self._launches: dict[Signature, SumLaunch] = {}
        # By their key and the ids of their parameters.
        self._unreduced: dict[tuple[Any, ...], UnreducedSums] = {}
        # The DDP modules of parameters, which are kept by id, and how often they were asked for.
        self._replicas: tuple[list[int], Replicas] = ([], Replicas([]))
        self._n_asked = 0
        # Whose gradients stay until the step, as zeros.
        self._zeroed: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self.totals or self._unreduced)

    def __getstate__(self) -> dict[str, Any]:
        """What pickles and copies hold; an error as of `check_reduced`."""
        self.check_reduced()
        return {"totals": self.totals}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]  # what a new one has
        self.totals = state["totals"]
        self.are_outside = bool(self.totals)

    def check_reduced(self) -> None:
        """Raise a RuntimeError for sums that cannot be saved, since other processes have their parts of them."""
        if self._unreduced:
            raise RuntimeError(
                "sums of gradients from DDP's no_sync() cannot be saved: each process has a part of them. "
                "Call step() first"
            )

    @torch.no_grad()
    def restore(self, saved: Mapping[Tensor, Tensor]) -> None:
        """Take copies of saved sums, in the placements of their parameters."""
        self.clear()
        self.are_outside = True
        for param, total in saved.items():
            self.totals[param] = _as_sum(local(param), local(placed_like(param, total.to(param.device))))

    def clear(self) -> None:
        """Start anew."""
        self.totals.clear()
        self._unreduced.clear()
        self._zeroed = []
        self.are_outside = False

    def finish(self) -> None:
        """End with the step that has used the sums."""
        for param in self._zeroed:
            param.grad = None
        self.clear()

    def take(self, params: Sequence[Tensor], launch: bool) -> None:
        """Add the gradients of all parameters to their sums and drop them. An error has changed nothing.

        Gradients that DDP has not reduced are summed apart, to be reduced once. With `launch` a kernel adds, in
        one launch for each signature, rather than torch operations.
        """
        for param in params:
            if param.grad is not None:
                _check_grad(param, param.grad)
                self._check_shape(param)
        self.are_outside |= not is_capturing()
        others = self._take_unreduced(params)
        parts = zip(others, map(_own_part, others), strict=True)
        grads = {param: grad for param, grad in parts if grad is not None}
        begun = {param: _as_sum(local(param), grad) for param, grad in grads.items() if param not in self.totals}
        added = [param for param in grads if param not in begun]
        calls = [partial(self.totals.update, begun), set_grads(list(grads), repeat(None))]
        if added:
            totals = [self.totals[param] for param in added]
            if launch and not is_capturing():
                self._launch(totals, [grads[param] for param in added])
            else:
                calls.insert(0, partial(torch._foreach_add_, totals, [grads[param] for param in added]))
        # Whatever fails above, no gradient is lost.
        at_once(calls)

    def _take_unreduced(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """Take the gradients that DDP has not reduced, and return the other parameters."""
        if not (dist.is_available() and dist.is_initialized()):
            return params
        ids = list(map(id, params))
        self._n_asked += 1
        # Now and then too, for a model may be wrapped later.
        if self._replicas[0] != ids or self._replicas[1].are_gone or self._n_asked.bit_count() == 1:
            self._replicas = ids, Replicas(params)
        groups = self._replicas[1].unreduced()
        chosen = [param for param in params if id(param) in groups and param.requires_grad]
        if not chosen:
            return params
        self._replicas[1].check_joined()
        zeroed = self._replicas[1].wanting()
        self._zeroed = [param for param in chosen if id(param) in zeroed]
        for key, members in by_buffer(chosen, groups).items():
            place = key, *map(id, members)
            if place not in self._unreduced:
                self._unreduced[place] = UnreducedSums(key, members)
            self._unreduced[place].take(zeroed)
        return [param for param in params if id(param) not in groups]

    def reduce(self) -> None:
        """Reduce the sums that are not yet, by one collective for each process group, device and dtype."""
        if self._unreduced:
            self._replicas[1].check_joined()
        while self._unreduced:
            # A step that fails after this one finds them reduced.
            reduced = self._unreduced.pop(next(iter(self._unreduced))).reduced()
            for param, total in reduced.items():
                self.totals[param] = total if param not in self.totals else self.totals[param].add_(total)

    def added_to(self, params: Sequence[Tensor], grads: Sequence[Any]) -> list[Any]:
        """For each parameter its sum, with its gradient if there is one too; None where both are missing."""
        for param in params:
            self._check_shape(param)
        return [
            grad if total is None else total if grad is None else total + grad
            for total, grad in zip(map(self.totals.get, params), grads, strict=True)
        ]

    def _check_shape(self, param: Tensor) -> None:
        """Check that a parameter has the shape of its sum, which would follow some other ones by broadcasting."""
        total = self.totals.get(param)
        # An uninitialized parameter has neither.
        if total is not None and total.shape != (shape := local(param).shape):
            raise ValueError(
                f"sum_grad() has summed gradients of shape {tuple(total.shape)}, but now their parameter has "
                f"shape {tuple(shape)}: give parameters another shape after step()"
            )

    @torch.no_grad()
    def hand_over(self, params: Sequence[Tensor], note: Callable[[Sequence[Tensor]], None]) -> None:
        """Make the sums, with the gradients that came after them, the gradients of their parameters.

        `params` are all parameters. `note` is called with those that had a sum.
        """
        self.reduce()
        chosen = [param for param in params if param in self.totals]
        handed = []
        for param, grad in zip(chosen, self.added_to(chosen, list(map(_own_part, chosen))), strict=True):
            dtype = getattr(param, "grad_dtype", param.dtype) or grad.dtype
            handed.append(distributed_like(param, grad.to(dtype)))
        at_once([set_grads(chosen, handed), partial(note, chosen), partial(self.totals.clear)])
        self.clear()

    def _launch(self, totals: list[Tensor], grads: list[Tensor]) -> None:
        from dragon.vm.torch.optim._backends.triton import SumLaunch

        members: dict[Signature, list[int]] = {}
        for index, (total, grad) in enumerate(zip(totals, grads, strict=True)):
            signature = Signature("triton", total.device, total.dtype, grad.dtype, (), (), None, False)
            members.setdefault(signature, []).append(index)
        for signature, indices in members.items():
            launch = self._launches.setdefault(signature, SumLaunch(signature))
            chosen = [totals[i] for i in indices]
            launch.add(chosen, [in_layout_of(total, grads[i]) for total, i in zip(chosen, indices, strict=True)])


def _own_part(param: Tensor) -> Tensor | None:
    """This process's shard of a parameter's gradient, in the placements of the parameter."""
    return None if param.grad is None else local(ready_grad(param, param.grad))


def _as_sum(param: Tensor, grad: Tensor) -> Tensor:
    """A first gradient as a sum: a copy, since others may hold the gradient, as DDP does its buckets."""
    dtype = SUM_DTYPES.get(grad.dtype, grad.dtype)
    copy = grad.to(dtype, copy=True)
    return in_layout_of(param, copy) if is_dense(param) else copy


def _check_grad(param: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"sum_grad() does not support gradients of layout {grad.layout}, and no step would use their sum. "
            "Give dense gradients: sparse=False for an embedding"
        )
    if not are_of_one_kind(param, grad):
        raise ValueError(f"a parameter is of {param.dtype}, but its gradient is of {grad.dtype}")
    if grad.shape == param.shape:
        return
    if getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            "sum_grad() cannot sum gradients of FullyShardedDataParallel inside no_sync(), which are not sharded "
            "yet. Leave no_sync() out, or leave sum_grad() out and let the last backward pass reduce the sum"
        )
    raise ValueError(f"a gradient has shape {tuple(grad.shape)}, but its parameter {tuple(param.shape)}")

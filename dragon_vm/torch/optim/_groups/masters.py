"""Masters whose parameters somebody else wrote to: they are noticed by PyTorch's version counters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from operator import attrgetter, ne
from typing import Any

import torch
from torch import Tensor

from dragon.vm.torch.optim._distributed.shards import is_distributed, is_distributed_type, local
from dragon.vm.torch.optim._formats.split import Master
from dragon.vm.torch.optim._groups.native import FORMAT_KEY, MASTER, MASTER_PARTS, parts_of
from dragon.vm.torch.optim._modes import if_possible

# The speed of C: a step reads the version of each parameter.
_version_of = attrgetter("_version")


class MasterVersions:
    """Versions of the parameters with masters after the last step that updated them."""

    def __init__(self) -> None:
        # By id: no parameter is held.
        self._seen: dict[int, int] = {}
        self._doubted: set[int] = set()

    def doubt(self, params: Sequence[Tensor]) -> None:
        """Compare distributed parameters with their masters before the next use: versions may miss a write.

        A state dict of a model has detached shards with version counters of their own, and a checkpoint is
        loaded into them.
        """
        self._doubted.update(id(param) for param in params if is_distributed(param))

    def forget(self) -> None:
        """Trust the masters as they are, whatever is written until the next step."""
        self._seen.clear()

    def notice(self, params: Sequence[Tensor], state: Mapping[Any, Any]) -> None:
        """Make parameters that were written to since `note` their own masters, and elements of doubted ones."""
        if changed := self._changed(params):
            # What was saved, and no step has converted yet, belongs to the weights that were written with it.
            stale = [param for param in changed if parts_of(state.get(param, {})).isdisjoint((MASTER, FORMAT_KEY))]
            written = list(filter(self._has_grown, stale))
            resync(written, state)
            self._doubted.update({*map(id, stale)}.difference(map(id, written)))
            self.note(changed, state)
        if self._doubted:
            doubted = [param for param in params if id(param) in self._doubted]
            reconcile(doubted, state)
            self._doubted.difference_update(map(id, doubted))

    def check_capture(self, params: Sequence[Tensor]) -> None:
        """Check within a capture that no parameter was written to since `note`.

        Raises:
            RuntimeError: if one was. A graph would take its old master at each replay.
        """
        if self._changed(params):
            raise RuntimeError(
                "a parameter with a master was written to since the last step, which a captured step cannot take "
                "over: call resync_master() before the capture"
            )

    def _changed(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The parameters with another version than at `note`; one that it has not seen is not among them."""
        versions = _versions(params)
        seen = list(map(self._seen.get, map(id, params), versions))
        return [] if seen == versions else list(compress(params, map(ne, seen, versions)))

    def _has_grown(self, param: Tensor) -> bool:
        """Whether a parameter was written to. Another one with the id of one that is gone has a lower version."""
        return _versions([param])[0] > self._seen[id(param)]

    def note(self, params: Sequence[Tensor], state: Mapping[Any, Any]) -> None:
        """Take what is in the parameters now for this optimizer's own doing."""
        n_seen = len(self._seen)
        self._seen.update(zip(map(id, params), _versions(params), strict=True))
        if len(self._seen) > n_seen:
            # Another parameter may get the id of one that is gone.
            held = {*map(id, state), *map(id, params)}
            self._seen = {key: version for key, version in self._seen.items() if key in held}

    def settled(self, state: Mapping[Any, Any]) -> list[Tensor]:
        """Notice writes to all parameters with masters, those of removed groups too, and return these."""
        entries = ((param, held) for param, held in state.items() if isinstance(held, Mapping))
        params = [param for param, held in entries if not held.keys().isdisjoint(MASTER_PARTS)]
        self.notice(params, state)
        return params

    def note_again(self, params: Sequence[Tensor], state: Mapping[Any, Any]) -> None:
        """Note those that were noted before."""
        self.note([param for param in params if id(param) in self._seen], state)


@torch.no_grad()
def resync(params: Iterable[Tensor], state: Mapping[Any, Any]) -> None:
    """Make parameters, as they are now, their own masters."""
    for param in params:
        entries = state.get(param, {})
        if isinstance(entries.get("param_remainder"), Tensor):
            local(entries["param_remainder"]).zero_()
        if isinstance(entries.get("param_master"), Tensor):
            local(entries["param_master"]).copy_(local(param))
        # A saved one is another's tensor.
        entries.pop(MASTER, None)


@torch.no_grad()
def reconcile(params: Sequence[Tensor], state: Mapping[Any, Any]) -> None:
    """Make elements their own masters that are not nearest to their fp32 master. A remainder belongs to any."""
    for param in params:
        master = state.get(param, {}).get("param_master")
        if isinstance(master, Tensor):
            Master(param.dtype).encode_rest(local(master), local(param), local(master))


def _versions(params: Sequence[Tensor]) -> list[int]:
    """Each grows with each write: to a distributed parameter, which its shard does not count, and to the shard."""
    versions = if_possible((RuntimeError,), lambda: list(map(_version_of, params)))
    if versions is None:
        # Tensors that inference mode made have no version. They are frozen.
        versions = [0 if param.is_inference() else param._version for param in params]
    if not any(map(is_distributed_type, set(map(type, params)))):
        return versions
    # A plain parameter is its own shard, and has one version in any company.
    shards = map(local, params)
    return [
        version if shard is param else version + shard._version
        for param, shard, version in zip(params, shards, versions, strict=True)
    ]

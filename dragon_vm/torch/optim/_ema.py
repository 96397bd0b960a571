"""Exchange parameters with their exponential moving averages for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exchanged(params: Sequence[Tensor], averages: Sequence[Tensor]) -> Iterator[None]:
    """Give each parameter the value of its average, rounded to its dtype; at the end, its own value again.

    Args:
        params: parameters.
        averages: of the parameters' shapes; left as they are.
    """
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        originals = [param.detach().clone() for param in params]
        if params:
            torch._foreach_copy_(list(params), list(averages))
    try:
        yield
    finally:
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            if params:
                torch._foreach_copy_(list(params), originals)

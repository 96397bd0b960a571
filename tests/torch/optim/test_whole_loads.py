"""A state dict is loaded as a whole, or not at all."""

import copy
import random
from collections import defaultdict
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import AdamW
from dragon.vm.torch.optim import optimizer as optimizer_module

from .interrupts import Interrupt, Tracer
from .judging import make_params, run, same_bits, snapshots
from .support import give_gradients, parameters
from .test_interrupts import IS_SOAK, contents, later_step, params_of


def test_an_interrupt_of_loading_leaves_all_as_it_was_or_all_as_it_was_saved() -> None:
    def both() -> tuple[Any, dict[str, Any]]:
        optimizer = later_step("native", ema_decay=0.5)
        optimizer.sum_grad()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
        return optimizer, saved

    def whole(optimizer: Any) -> tuple[Any, ...]:
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        return contents(optimizer), groups, len(optimizer._sums.totals)

    optimizer, saved = both()
    before = whole(optimizer)
    counter = Tracer(None)
    counter.run(partial(optimizer.load_state_dict, saved))
    allowed = before, whole(optimizer)
    generator = random.Random(0)
    for _ in range(20 * (42 if IS_SOAK else 1)):
        # The copies come first, and take most of the time.
        at = generator.randint(counter.count * 3 // 4, counter.count - 1)
        optimizer, saved = both()
        with suppress(Interrupt):
            Tracer(at).run(partial(optimizer.load_state_dict, saved))
        assert whole(optimizer) in allowed
        optimizer.load_state_dict(saved)
        assert whole(optimizer) == allowed[1]


@pytest.mark.parametrize("master_weights", [torch.float32, "split16"], ids=str)
def test_an_interrupt_of_loading_leaves_it_known_that_a_parameter_was_written_to(master_weights: Any) -> None:
    def written() -> tuple[Any, dict[str, Any]]:
        optimizer = AdamW(parameters([(3,)], torch.bfloat16), master_weights=master_weights)
        (param,) = params_of(optimizer)
        give_gradients([param], 0)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        with torch.no_grad():
            param.add_(1)
        return optimizer, saved

    def masters(optimizer: Any) -> list[float]:
        ((_, value),) = optimizer.master_weights()
        found: list[float] = value.tolist()
        return found

    folder = str(optimizer_module.__file__)
    optimizer, saved = written()
    allowed = [masters(written()[0])]
    counter = Tracer(None, folder)
    counter.run(partial(optimizer.load_state_dict, saved))
    allowed.append(masters(optimizer))
    for at in range(1, counter.count + 1):
        optimizer, saved = written()
        with pytest.raises(Interrupt):
            Tracer(at, folder).run(partial(optimizer.load_state_dict, saved))
        assert masters(optimizer) in allowed, at


@pytest.mark.parametrize("names", [(), ("state",), ("param_groups",)], ids=str)
@pytest.mark.parametrize("make", [AdamW, torch.optim.AdamW])
def test_the_rest_stays_where_a_state_is_set_in_part(make: Any, names: tuple[str, ...]) -> None:
    optimizer = make(make_params(), lr=0.1)
    run(optimizer, range(2))
    expected = copy.deepcopy(optimizer)
    optimizer.__setstate__({name: value for name, value in vars(optimizer).items() if name in names})
    run(optimizer, range(2, 4))
    run(expected, range(2, 4))
    assert same_bits(*map(snapshots, (optimizer, expected)))


def test_a_hook_of_loading_has_the_last_word() -> None:
    def forget(optimizer: Any) -> None:
        optimizer.__setstate__({"state": defaultdict(dict), "param_groups": optimizer.param_groups})

    optimizer = AdamW(make_params())
    run(optimizer, range(1))
    optimizer.register_load_state_dict_post_hook(forget)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state


def test_a_number_that_no_step_takes_loads_as_a_whole_where_groups_are_watched() -> None:
    optimizer = AdamW(make_params(), capturable=True)
    run(optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = "fast"
    run(optimizer, range(1, 2))
    optimizer.load_state_dict(saved)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    with pytest.raises(TypeError, match="lr must be a number, but got 'fast'"):
        optimizer.step()

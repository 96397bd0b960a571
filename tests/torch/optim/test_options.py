import math

import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam, AdamW
from dragon.vm.torch.optim._options import GROUP_DEFAULTS, AdamOptions, CommonOptions, Settings


def test_every_documented_option_is_taken_and_every_taken_option_is_documented():
    documented = set(CommonOptions.__annotations__)
    assert documented == {*GROUP_DEFAULTS, *Settings._fields}
    assert set(AdamOptions.__annotations__) - documented == {"epsilon_hat", "decoupled_weight_decay"}


@pytest.mark.parametrize("algorithm", [Adam, AdamW, SGD])
def test_options_of_groups_are_defaults_and_settings_are_not(algorithm):
    optimizer = algorithm([torch.nn.Parameter(torch.ones(1))], grad_scale=0.5, max_grad_norm=2.0)
    assert optimizer.param_groups[0]["grad_scale"] == optimizer.defaults["grad_scale"] == 0.5
    assert not set(Settings._fields) & set(optimizer.param_groups[0])


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0}, {"clip_norm": math.inf}, {"clip_value": 0, "max_grad_norm": 1},
        {"max_grad_norm": math.inf},
        {"norm_type": 2}, {"norm_type": math.inf}, {"ema_decay": 0}, {"grad_scale": 0.1}, {"state_dtype": None},
        {"foreach": False, "fused": False, "capturable": True}, {"clip_norm": 1.0, "clip_value": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_values_at_the_border_are_taken(options):
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = Adam([param], **options)
    param.grad = torch.full((2,), 0.5)
    optimizer.step()
    assert param.isfinite().all()
    assert (param < 1).all()

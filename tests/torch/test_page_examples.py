"""The four examples of the API page, letter by letter; an optimizer is set up where the page leaves it out."""

import pytest
import torch as real

from dragon.vm import torch

PARAM_GROUP = """
# A group defined ``lr`` and ``weight_decay``
param_group = {'params': [], 'lr': 0.01, 'weight_decay': 0.0001}
"""

STEP = """
x = torch.ones(1, 3, requires_grad=True)
y = x + 1
y.backward()
optimizer.step()
"""

SUM_GRAD = """
x = torch.ones(1, requires_grad=True)
optimizer = torch.optim.SGD([x], lr=0.1)
for epoch in range(2):
    for step in range(3):
        y = x + 1
        y.backward()
        optimizer.sum_grad()
    optimizer.step()
print(x)  # 0.4
"""

ZERO_GRAD = """
m1 = torch.nn.Linear(3, 3)
m2 = torch.nn.Linear(3, 3)
x = torch.ones(1, 3, requires_grad=True)
for i in range(10):
    x = m1(x)
    if i in (2, 4, 6):
        x += m2(x)
optimizer.zero_grad(set_to_none=True)
x.backward()
optimizer.step()
"""


def run(example, **names):
    namespace = {"torch": torch, **names}
    exec(example, namespace)
    return namespace


def run_with_optimizer_after(name, example, make_optimizer):
    """Run an example, with an optimizer that is made below the last line that starts with `name`."""
    lines = example.strip().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if line.startswith(name))
    namespace = run("".join(lines[: last + 1]))
    namespace["optimizer"] = make_optimizer(namespace)
    exec("".join(lines[last + 1 :]), namespace)
    return namespace


def test_a_param_group_holds_its_own_learning_rate_and_decay():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    param_group = run(PARAM_GROUP)["param_group"]
    param_group["params"].append(torch.nn.Parameter(torch.ones(3)))

    optimizer.add_param_group(param_group)

    assert [group["lr"] for group in optimizer.param_groups] == [0.001, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0.0001]


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_a_step_follows_a_backward_of_a_non_scalar(name):
    def make_optimizer(names):
        return getattr(torch.optim, name)([names["x"]], lr=0.1)

    x = run_with_optimizer_after("x", STEP, make_optimizer)["x"]

    torch.testing.assert_close(x.detach().as_subclass(real.Tensor), real.full((1, 3), 0.9))


def test_sum_grad_sums_the_gradients_of_three_backwards(capsys):
    run(SUM_GRAD)

    assert capsys.readouterr().out.startswith("tensor([0.4000]")


def test_gradients_that_are_not_computed_every_time_are_set_to_none():
    left_out = torch.nn.Linear(3, 3)
    for parameter in left_out.parameters():
        parameter.grad = real.ones_like(parameter)
    before = []

    def make_optimizer(names):
        parameters = [*names["m1"].parameters(), *names["m2"].parameters(), *left_out.parameters()]
        before.extend(parameter.detach().clone() for parameter in parameters)
        return torch.optim.Adam(parameters)

    optimizer = run_with_optimizer_after("m2", ZERO_GRAD, make_optimizer)["optimizer"]

    after = optimizer.param_groups[0]["params"]
    assert [not real.equal(old, new) for old, new in zip(before, after, strict=True)] == [True] * 4 + [False] * 2

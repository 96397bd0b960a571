import math
import re
from typing import Any

import pytest
import torch

from dragon.vm._run_options import asks_for_help, parse
from dragon.vm.run import HELP
from dragon.vm.torch.optim._counterparts import own_options
from dragon.vm.torch.optim._hints import option_of


def test_help_has_a_meaning_for_every_option_of_swap() -> None:
    for name in own_options() - {"process_group"}:
        assert re.search(rf"^  {option_of(name)}\b.*(?:\n {{10,}}|  )\S", HELP, re.MULTILINE), name


RIGHT: dict[tuple[str, ...], dict[str, Any]] = {
    ("--state-dtype", "8bit"): {"state_dtype": "8bit"},
    ("--state-dtype=bfloat16", "--no-stochastic-rounding"): {
        "state_dtype": torch.bfloat16,
        "stochastic_rounding": False,
    },
    ("--state-dtype", "exp_avg=bfloat16,exp_avg_sq=torch.float32"): {
        "state_dtype": {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.float32}
    },
    ("--master-weights", "split8", "--rounding-seed", "7"): {"master_weights": "split8", "rounding_seed": 7},
    ("--master-weights", "float32", "--backend", "None"): {"master_weights": torch.float32, "backend": None},
    ("--flatten", "--max-grad-norm", "1e-2"): {"flatten": True, "max_grad_norm": 0.01},
    ("--norm-type", "inf", "--backend", "native"): {"norm_type": math.inf, "backend": "native"},
    ("--epsilon-hat", "--ema-decay", "0.9"): {"epsilon_hat": True, "ema_decay": 0.9},
}


@pytest.mark.parametrize("words", RIGHT, ids=" ".join)
@pytest.mark.parametrize("program", [["train.py", "--flatten", "-m"], ["-m", "train", "--state-dtype", "x"]])
def test_options_in_front_of_the_script_are_those_of_swap(words: tuple[str, ...], program: list[str]) -> None:
    as_module = program[0] == "-m"
    assert parse([*words, *program]) == (RIGHT[words], program[as_module:], as_module)


@pytest.mark.parametrize(
    ("program", "argv", "as_module"),
    [
        ("-m train a -- b", "train a -- b", True),
        ("-m train -- a", "train -- a", True),
        ("-m train --", "train --", True),
        ("-m train a -- -m b", "train a -- -m b", True),
        ("-m train -mb -x=1 -m", "train -mb -x=1 -m", True),
        ("-mtrain a b", "train a b", True),
        ("-mtrain --x 1", "train --x 1", True),
        ("train.py -- a -m b", "train.py -- a -m b", False),
        ("-- train.py -- a", "train.py -- a", False),
        ("-- -m a", "-m a", False),
        ("- a", "- a", False),
    ],
)
@pytest.mark.parametrize("options", ["", "--flatten --norm-type -1", "--norm-type=-1 --no-flatten"])
def test_every_argument_reaches_the_program(options: str, program: str, argv: str, as_module: bool) -> None:
    found, *rest = parse(f"{options} {program}".split())
    assert rest == [argv.split(), as_module]
    assert found.get("norm_type") == (-1 if options else None)


@pytest.mark.parametrize(
    ("words", "is_asked"),
    [
        ("--flatten -h", True),
        ("--help train.py", True),
        ("train.py --help", False),
        ("-m train -h", False),
        ("-- --help", False),
    ],
)
def test_only_options_in_front_of_the_program_ask_for_help(words: str, is_asked: bool) -> None:
    assert asks_for_help(words.split()) == is_asked

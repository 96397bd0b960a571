"""Cases shrink to the memory there is, or say that they cannot; selections mean what they say."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks.cases import CASES, FP32, Case
from benchmarks.contenders import CONTENDERS, TORCH_FUSED
from benchmarks.selection import choose_cases, choose_contenders


@given(st.sampled_from(list(CASES.values())), st.integers(1, 10**10))
def test_a_case_keeps_as_many_layers_as_fit_the_memory(case: Case, max_numel: int) -> None:
    assume(case.numel <= max_numel or (case.scaled is not None and Case("", case.scaled(1)).numel <= max_numel))
    fitting = case.fit(max_numel)
    assert fitting.numel <= max_numel
    assert fitting.name == case.name
    if fitting is not case:
        assert Case("", case.scaled(fitting.n_layers + 1)).numel > max_numel
        assert fitting.n_layers < fitting.n_layers_of_model == case.n_layers


@pytest.mark.parametrize(("name", "max_numel"), [("1 x 20M", 19_999_999), ("Llama-3-8B", 10**9)])
def test_a_case_that_does_not_fit_says_so(name: str, max_numel: int) -> None:
    with pytest.raises(ValueError, match=f"{CASES[name].numel:,} parameters, but memory for {max_numel:,}"):
        CASES[name].fit(max_numel)


def test_a_name_means_itself_and_a_part_of_names_all_that_have_it() -> None:
    assert [case.name for case, _ in choose_cases(["1000 x 1"], ["fp32"], "quick")] == ["1000 x 1"]
    chains = {case.name for case, _ in choose_cases(["chain"], ["fp32"], "quick")}
    assert chains == {name for name, case in CASES.items() if case.chain}
    assert len(chains) > 1


def test_each_set_is_part_of_the_next_one() -> None:
    quick, full = (choose_cases([], [], name) for name in ("quick", "full"))
    assert set(quick) < set(full)
    assert {precision for _, precision in quick} == {FP32}
    assert {case.name for case, _ in full} == set(CASES)


def test_whoever_is_chosen_brings_the_one_that_ratios_are_to() -> None:
    assert [c.name for c in choose_contenders(["optimi"], "quick")] == [TORCH_FUSED, "optimi"]
    assert {c.name for c in choose_contenders([], "full")} == set(CONTENDERS)
    assert [c.name for c in choose_contenders([], "quick") if c.slow] == []


@pytest.mark.parametrize(
    "choose", [lambda: choose_cases(["x 3"], [], "quick"), lambda: choose_cases([], ["fp8"], "quick")]
)
def test_an_unknown_name_is_an_error_that_names_the_known_ones(choose) -> None:
    with pytest.raises(ValueError, match=r"no (case|dtype) is called .*; there are (1000 x 1|fp32)"):
        choose()

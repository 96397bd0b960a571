"""Random training scripts on random wrappers, modes and numbers of processes, bit by bit as in one process."""

from typing import Any

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from ..torch.optim.memory.modes import MODES
from ..torch.optim.support import patient
from .cluster import Cluster

# Where columns are cut, 4 processes would cut through blocks.
KINDS = {"ddp": 4, "fsdp2": 5, "fsdp2 hsdp": 4, "fsdp2 offload": 3, "tp": 3, "fsdp2 and tp": 4}
SEEDS = st.integers(1, 10**6)
CHANGES = st.fixed_dictionaries(
    {"lr": st.sampled_from([0.0, 1e-3, 0.1])},
    optional={
        "betas": st.sampled_from([(0.9, 0.999), (0.8, 0.95), (0.95, 0.9999)]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "grad_scale": st.sampled_from([1.0, 0.5]),
    },
)
TRAINING = (
    st.tuples(st.just("step"), SEEDS, st.just([])),
    st.tuples(st.just("change"), CHANGES),
    st.tuples(st.just("write"), st.sampled_from([0.5, 1.0, -2.0])),
    st.tuples(st.just("average")),
    st.tuples(st.just("join")),
    st.tuples(st.just("load"), st.sampled_from(["same", "fresh", "dcp", "full"])),
)
# What gradient release refuses, or has no meaning there.
WHOLE = (
    st.tuples(st.just("step"), SEEDS, st.lists(st.integers(0, 5), max_size=2)),
    st.tuples(st.just("sum_up"), SEEDS),
    st.tuples(st.just("skip"), SEEDS, st.integers(0, 5)),
)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(KINDS)))
    n_processes = draw(st.integers(1, KINDS[kind]))
    releases = kind != "ddp" and draw(st.booleans())
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={"amsgrad": st.booleans(), "ema_decay": st.sampled_from([0.5, 0.9]), "rounding_seed": SEEDS},
        )
    )
    options |= {"native_state_dict": draw(st.booleans())}
    options |= {"release_gradients": True} if releases else {"skip_nonfinite": True}
    events = draw(st.lists(st.one_of(*TRAINING, *(() if releases else WHOLE)), min_size=1, max_size=12))
    name = draw(st.sampled_from(["native", "eager"]))
    mode = draw(st.sampled_from(["plain", "plain bf16", *MODES]))
    arguments = {"kind": kind, "mode": mode, "name": name, "options": options, "events": events}
    arguments["n_late"] = draw(st.integers(0, 2))
    return {"n_processes": n_processes, "scenario": "soak:interleaved", **arguments}


@pytest.fixture(scope="module")
def processes(cluster: Cluster) -> Cluster:
    return cluster


@settings(patient, max_examples=max(settings().max_examples // 10, 1))
@given(case=cases())
def test_any_interleaving_is_that_of_one_process(processes: Cluster, case: dict[str, Any]) -> None:
    note(case)
    found = processes.run(**case)
    assert found == [[]] * len(found)

"""The bytes a parameter that README and the guide state are those that are allocated."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import AdamW

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/guides/memory.md")
ROW = re.compile(
    r"^\| (?P<weights>[^|]+) \| (?P<states>[^|]+) \| (?:`(?P<options>[^`|]+)`)? ?\| (?P<kept>[\d.]+) \|",
    re.MULTILINE,
)
SIZE = 512


def rows() -> list[tuple[str, str, float]]:
    """Dtype, options and bytes of each row of the tables, without those that both pages have."""
    found = {
        ("bfloat16" if row["weights"].startswith("bf16") else "float32", row["options"] or "", float(row["kept"]))
        for page in PAGES
        for row in ROW.finditer((ROOT / page).read_text(encoding="utf-8"))
    }
    return sorted(found)


def bytes_kept(dtype: torch.dtype, options: dict[str, Any]) -> float:
    """Bytes a parameter of a weight and all that its optimizer keeps, but for the step count."""
    weight = torch.nn.Parameter(torch.randn(SIZE, SIZE).to(dtype))
    weight.grad = torch.randn(SIZE, SIZE).to(dtype)
    optimizer = AdamW([weight], **options)
    optimizer.step()
    kept = [value for name, value in optimizer.state[weight].items() if name != "step" and torch.is_tensor(value)]
    return sum(tensor.untyped_storage().nbytes() for tensor in (weight, *kept)) / weight.numel()


def test_both_tables_are_read() -> None:
    assert len(rows()) == 8


@pytest.mark.parametrize(("dtype", "options", "kept"), rows())
def test_a_row_states_what_is_allocated(dtype: str, options: str, kept: float) -> None:
    arguments = eval(f"dict({options})", {"torch": torch})
    assert bytes_kept(getattr(torch, dtype), arguments) == pytest.approx(kept, abs=0.05)

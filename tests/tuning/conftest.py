"""Every test of tuning has a store of its own, and forgets what others looked up."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dragon.vm.tuning import lookup, store


@pytest.fixture(autouse=True)
def tuning_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "tuning"
    monkeypatch.setenv(store.FOLDER_VARIABLE, str(folder))
    lookup.forget()
    yield folder
    lookup.forget()

"""Every test of tuning has a folder of results of its own, and forgets what others looked up."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dragon.vm.torch.optim._backends import configs


@pytest.fixture(autouse=True)
def tuning_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "tuning"
    monkeypatch.setenv(configs.FOLDER_VARIABLE, str(folder))
    configs._find.cache_clear()
    yield folder
    configs._find.cache_clear()

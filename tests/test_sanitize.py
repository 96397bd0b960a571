"""What compute-sanitizer is run on computes the right thing, and reports a kernel that does not."""

import pytest

from tests import sanitize


@pytest.mark.usefixtures("interpreted")
def test_the_kernels_that_are_sanitized_do_what_the_eager_backend_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["--dry", "--variant", "momentum"]) == 0
    assert capsys.readouterr().out.count(" as eager") == 2


@pytest.mark.usefixtures("interpreted")
def test_a_kernel_that_does_something_else_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "difference", lambda *arguments: 0.5)
    assert sanitize.main(["--dry", "--variant", "SGD fp32"]) == 1
    assert "NOT as eager" in capsys.readouterr().out


def test_a_name_that_no_variant_has_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        sanitize.main(["--dry", "--variant", "fp12"])
    assert stopped.value.code == 2

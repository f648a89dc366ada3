"""The native module is loaded only by the torch minor that it was built against."""

import re
from pathlib import Path

import pytest

from pygpukit_torch import _build_check

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("built", "running"), [("2.13.0", "2.13.0"), ("2.13.0+cpu", "2.13.1+cu130")]
)
def test_patch_releases_and_flavours_fit(built: str, running: str) -> None:
    _build_check.check(built, running, str(ROOT))


@pytest.mark.parametrize(("built", "running"), [("2.13.0", "2.14.1"), ("2.1.0", "2.10.0")])
def test_another_minor_is_refused_with_the_command_that_mends_it(built: str, running: str) -> None:
    text = f"built against torch {built}, but torch {running} is installed"
    with pytest.raises(ImportError, match=re.escape(text)) as caught:
        _build_check.check(built, running, str(ROOT))
    command = f"pip install --no-build-isolation --no-deps --force-reinstall {ROOT}"
    assert str(caught.value).endswith(command)


def test_sources_that_are_gone_are_not_named() -> None:
    assert _build_check.mend("/nowhere").endswith(_build_check.UNKNOWN)


def test_this_build_names_its_torch() -> None:
    _build_check.check_this_build()

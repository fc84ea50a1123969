"""Every reader of an outside file, and every word of a command line, with one fault: one error, or the right result.

The same few tries each time. ``tools/fuzz.py`` makes as many as are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz import words
from tests.fuzz.readers import READERS
from tests.fuzz.tries import Ended, one_try, spoilt

pytestmark = pytest.mark.processes


def few(examples: int) -> settings:
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


SLOW = {"config-loaded": 6, "weights": 6, "weights-index": 6, "export": 2}  # a good input takes a tenth of a second


# `tools/fuzz.py` tries these: their good input alone takes a second, or another of the kind is tried here.
LEFT = ("report-global-mp-text", "report-global-mp-network", "report-tyr", "export", "recipe-global-mp", "onnx")


@pytest.mark.parametrize("name", [name for name in READERS if name not in LEFT])
def test_a_file_with_one_fault_is_refused_by_one_error_or_read_rightly(name: str, tmp_path: Path) -> None:
    reader, folder = READERS[name], tmp_path / "in"
    folder.mkdir()
    reader.make(folder)
    good = reader.read(folder)

    @few(SLOW.get(name, 2 if name.startswith("report-") else 10))
    @given(spoilt(reader, folder))
    def one(drawn: Any) -> None:
        change, made = drawn
        ended = one_try(reader, folder, good, change, made)
        assert not ended.fault, f"{change}\n{ended.verdict}: {ended.detail}"

    one()
    assert reader.read(folder) == good


@few(30)
@given(words.number_tries())
def test_a_number_of_an_option_is_within_its_bounds_or_refused(drawn: tuple[str, Callable[[], Ended]]) -> None:
    what, act = drawn
    ended = act()
    assert not ended.fault, f"{what}\n{ended.verdict}: {ended.detail}"


@few(40)
@given(words.set_tries())
def test_a_value_that_is_set_is_sensible_or_refused(drawn: tuple[str, Callable[[], Ended]]) -> None:
    what, act = drawn
    ended = act()
    assert not ended.fault, f"{what}\n{ended.verdict}: {ended.detail}"


def test_a_name_of_nothing_is_one_error_wherever_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words.make(tmp_path)

    @few(20)
    @given(words.name_tries(tmp_path))
    def one(drawn: tuple[str, Callable[[], Ended]]) -> None:
        what, act = drawn
        ended = act()
        assert not ended.fault, f"{what}\n{ended.verdict}: {ended.detail}"

    one()

"""Activations on disk, written by some processes and read by others."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from compress.errors import CompressError
from compress.language.activations import Room, is_whole, load_part, save_part

WHOLE = torch.arange(11 * 6, dtype=torch.float32).reshape(11, 2, 3)


def written(folder: Path, cuts: list[int]) -> None:
    for first, last in pairwise(cuts):
        save_part(folder, range(first, last), {"a": WHOLE[first:last], "b": -WHOLE[first:last]})


@pytest.mark.parametrize("cuts", [[0, 11], [0, 4, 11], [0, 3, 3, 8, 11]])
@pytest.mark.parametrize("wanted", [[0, 11], [0, 5, 11], [0, 2, 7, 9, 11]])
def test_any_number_of_readers_reads_what_any_number_of_writers_wrote(
    cuts: list[int], wanted: list[int], tmp_path: Path
) -> None:
    written(tmp_path, cuts)
    assert is_whole(tmp_path, 11) and not is_whole(tmp_path, 12)
    for first, last in pairwise(wanted):
        found = load_part(tmp_path, range(first, last))
        assert torch.equal(found["a"], WHOLE[first:last]) and torch.equal(found["b"], -WHOLE[first:last])


def test_parts_of_two_numbers_of_processes_may_lie_side_by_side(tmp_path: Path) -> None:
    written(tmp_path, [0, 4, 8])  # two of three, stopped before the third had written
    assert not is_whole(tmp_path, 11)
    written(tmp_path, [0, 6, 11])
    assert is_whole(tmp_path, 11)
    assert torch.equal(load_part(tmp_path, range(2, 9))["a"], WHOLE[2:9])


def test_a_kept_file_that_was_changed_is_named_and_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "walk" / "before-003"
    written(folder, [0, 6, 11])
    _, second = sorted(folder.iterdir())
    whole = second.read_bytes()
    for at in range(0, len(whole), 7):
        second.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(CompressError, match="changed since it was written") as said:
            load_part(folder, range(11))
        assert said.value.where == str(second) and str(tmp_path / "walk") in said.value.fix
        assert torch.equal(load_part(folder, range(6))["a"], WHOLE[:6]), "another's part is not read"


def test_what_a_kill_left_half_written_is_not_taken_for_whole(tmp_path: Path) -> None:
    written(tmp_path, [0, 6])
    (tmp_path / "00000006-00000011.partial").write_bytes(b"half")
    assert not is_whole(tmp_path, 11)
    assert not is_whole(tmp_path / "nothing", 1)


def test_offloaded_activations_hold_the_same_values_in_files_that_leave_nothing_behind(tmp_path: Path) -> None:
    room = Room(tmp_path / "room")
    first, second = room.hold(WHOLE), room.hold(WHOLE + 1)
    second[0] += 5
    assert torch.equal(first, WHOLE) and torch.equal(second[1:], WHOLE[1:] + 1) and float(second[0, 0, 0]) == 6.0
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "room") in maps  # it is the file that is mapped, not memory
    assert list((tmp_path / "room").iterdir()) == []
    assert Room(None).hold(WHOLE) is WHOLE

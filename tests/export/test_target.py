"""Target files: five lines of one's own, faults named with file, line and the nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import UsageError
from compress.exporters.bench.local import Local
from compress.exporters.bench.ssh import Ssh
from compress.exporters.target import load_target, target_names, transport_of
from tests.command import compress, one_error


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_every_target_that_comes_along_is_whole() -> None:
    assert {
        "this-machine",
        "this-gpu",
        "cpu-server",
        "h100",
        "a100",
        "l4",
        "jetson-orin",
        "raspberry-pi-5",
        "pixel-8",
        "galaxy-s24",
    } == set(target_names())
    for name in target_names():
        target = load_target(name)
        assert target.name == name and target.description
        assert (target.format.startswith("tensorrt")) == bool(target.compute_capability)


def test_five_lines_make_a_target(tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    mine = write(
        tmp_path,
        f"extends: raspberry-pi-5\ntransport: {{host: pi.local, user: me, key: {tmp_path}/key}}\nthreads: 2\n"
        "budget: 40\nshapes: {batch: 4}\n",
    )
    target = load_target(str(mine))
    assert (target.name, target.threads, target.budget, target.cool_down) == ("mine", 2, 40, 10)
    assert target.shapes.batch == 4 and target.shapes.prompts == [128], (
        "what is not said is as in the target it extends"
    )
    way = transport_of(target)
    assert isinstance(way, Ssh) and way.title == "me@pi.local" and way.host_key == "strict"
    assert target.spec(threads=None, batch=8)["batch"] == 8 and target.spec()["threads"] == 2


def test_this_machine_is_local() -> None:
    assert isinstance(transport_of(load_target("this-machine")), Local)


@pytest.mark.parametrize(
    ("text", "what", "where", "fix"),
    [
        ("extends: pixel-8\nthread: 4\n", "unknown key 'thread'", "line 2", "did you mean 'threads'"),
        ("transport:\n  kind: ssh\n  hots: a\n", "unknown key 'hots'", "line 3", "did you mean 'host'"),
        ("extends: pixel-9\n", "unknown target 'pixel-9'", "--target", "did you mean 'pixel-8'"),
        ("format: onx\n", "format: ", "line 1", ""),
        ("threads: 0\n", "threads: ", "line 1", ""),
        ("transport: {host: a}\n", "host belongs to kind ssh, and the kind is local", "line 1", ""),
        ("transport: {kind: ssh, host: -oProxyCommand=x}\n", "transport.host", "line 1", ""),
        ("extends: mine.yaml\n", "a target extends itself", "mine.yaml", "circle"),
        ("threads: [\n", "not valid YAML", "mine.yaml", ""),
    ],
)
def test_a_fault_is_named_with_its_place(tmp_path: Path, text: str, what: str, where: str, fix: str) -> None:
    with pytest.raises(UsageError) as e:
        load_target(str(write(tmp_path, text)))
    assert what in e.value.what and where in e.value.where and fix in e.value.fix, str(e.value)


def test_the_command_names_the_nearest_target(tmp_path: Path) -> None:
    one_error(compress("doctor", "--target", "pixel8"), 2, "unknown target 'pixel8'", "did you mean 'pixel-8'")
    one_error(compress("bench", tmp_path, tmp_path, "--target", "none.yaml"), 2, "there is no such target file")
    one_error(compress("doctor", "--target", "h100"), 2, "does not say where it is", "transport.host")
    missing = write(tmp_path, f"transport: {{kind: ssh, host: h, key: {tmp_path}/none}}\n")
    one_error(compress("doctor", "--target", missing), 2, "there is no such file", "transport.key")


def test_targets_are_listed() -> None:
    ran = compress("list", "targets")
    assert ran.code == 0 and "pixel-8" in ran.out and "recipes" not in ran.out

"""Targets: YAML files that say what to build and where to measure it, checked completely before anything is started.

A target may extend another (``extends: raspberry-pi-5``): its values are laid over the other's, key by key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from compress.errors import UsageError
from compress.exporters.bench.transport import Transport
from compress.schema.recipe import Path_, Place, explain, named_file, read_layers
from compress.schema.section import Clash, Count, Section

TARGETS = Path(__file__).parent / "targets"
HERE = "this-machine"


class TransportSection(Section):
    """How the device is reached; what is not given is as in the user's own ssh or adb settings."""

    kind: Literal["local", "ssh", "adb"] = "local"
    host: str | None = Field(None, min_length=1, pattern=r"^[^-\s][^\s]*$", description="ssh: name or address")
    port: int | None = Field(None, ge=1, le=65535, description="ssh")
    user: str | None = Field(None, min_length=1, pattern=r"^[^-\s][^\s]*$", description="ssh")
    key: str | None = Field(None, description="ssh: path of the private key")
    known_hosts: str | None = Field(None, description="ssh: path of a known_hosts file of its own")
    host_key: Literal["strict", "accept-new"] = Field(
        "strict", description="ssh: whether an unknown host's key is taken at the first contact; a changed one never is"
    )
    serial: str | None = Field(None, min_length=1, description="adb: which device, where there are several")
    python: str | None = Field(None, description="the interpreter there, with numpy and the runtime")
    benchmark: str | None = Field(
        None, description="adb: the runtime's own benchmark program there, in place of Python"
    )
    folder: str | None = Field(None, description="where artefacts are kept there")

    @model_validator(mode="after")
    def _fits(self) -> TransportSection:
        foreign = {"host": "ssh", "port": "ssh", "user": "ssh", "key": "ssh", "known_hosts": "ssh", "serial": "adb",
                   "benchmark": "adb"}  # fmt: skip
        for name, kind in foreign.items():
            if getattr(self, name) is not None and kind != self.kind:
                raise Clash(
                    f"{name} belongs to kind {kind}, and the kind is {self.kind}",
                    f"leave {name} out, or say kind: {kind}",
                )
        return self


class Shapes(Section):
    """The shapes that engines are optimised for and that are measured."""

    batch: int = Field(1, ge=1, description="networks: samples of one call")
    inputs: dict[str, list[Count]] = Field({}, description="networks: shapes of inputs whose axes the file leaves open")
    prompts: list[Count] = Field(
        [512], min_length=1, description="language models: tokens of the prompt TTFT is measured on"
    )
    contexts: list[Count] = Field([512], min_length=1, description="language models: tokens in the cache at TPOT")
    max_context: int | None = Field(None, ge=1, description="language models: most tokens an engine must take")


class Measure(Section):
    """The protocol's numbers."""

    processes: int = Field(5, ge=1, description="fresh processes per model, interleaved ABBA")
    min_seconds: float = Field(2.0, gt=0, description="measure each figure at least this long")
    min_runs: int = Field(10, ge=2, description="and at least this often")
    sample_seconds: float = Field(
        0.1, ge=0, description="faster calls are batched into samples of this length; 0: each call is one, for p90, p99"
    )


class Target(Section):
    """What to build and where to measure it."""

    name: str
    description: str = ""
    format: Literal["onnx", "ort", "executorch", "litert", "openvino", "mnn", "tensorrt", "tensorrt_rtx"] = "onnx"
    precision: Literal["fp32", "fp16", "bf16", "int8", "int8-weights"] = "fp32"
    compute_capability: list[Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]$")]] = Field(
        [], description="GPUs an engine is built for, such as '8.9'"
    )
    options: dict[str, Any] = Field({}, description="options of the runtime when it loads the file")
    transport: TransportSection = TransportSection()
    threads: int = Field(1, ge=1)
    cool_down: float = Field(0.0, ge=0, description="seconds of rest before every process")
    budget: float | None = Field(None, gt=0, description="milliseconds a call may take")
    shapes: Shapes = Shapes()
    measure: Measure = Measure()
    emulated: bool = Field(False, description="its speed is not the device's: latencies are marked and never gated")
    round_to: int | None = Field(None, ge=1, description="channels its kernels work in")
    notes: str = ""

    def spec(self, **given: Any) -> dict[str, Any]:
        """What `compress.exporters.bench.local.compare` takes; ``given`` has the last word where it is not None."""
        found: dict[str, Any] = {
            "threads": self.threads,
            **self.measure.model_dump(),
            "options": self.options,
            "batch": self.shapes.batch,
            "shapes": self.shapes.inputs,
            "prompts": self.shapes.prompts,
            "contexts": self.shapes.contexts,
        }
        found |= {k: v for k, v in given.items() if v is not None}
        return {**found, "prompt": found["prompts"][0], "context": found["contexts"][0]}


def target_names() -> dict[str, Path]:
    return {path.stem: path for path in sorted(TARGETS.glob("*.yaml"))}


def load_target(name: str = HERE) -> Target:
    """Reads and checks a target.

    Args:
        name: a target's name, or the path of a YAML file.

    Raises:
        UsageError: anything in it is wrong; file, line, key and the nearest valid name are given.
    """
    places: dict[Path_, Place] = {}
    path = _find(name)
    data = read_layers(path, places, _find, "target")
    data.setdefault("name", path.stem)
    try:
        return Target.model_validate(data)
    except ValidationError as e:
        raise explain(e, Target, places, (), str(path)) from None


def _find(name: str) -> Path:
    return named_file(name, target_names(), "target")


def transport_of(target: Target) -> Transport:
    """The way to the target's device; nothing is reached yet.

    Raises:
        UsageError: the target does not say where it is.
    """
    how = target.transport
    if how.kind == "ssh":
        from compress.exporters.bench.ssh import Ssh

        if how.host is None:
            raise UsageError(
                f"the target {target.name} does not say where it is",
                where="transport.host",
                fix=f"write a file with `extends: {target.name}` and `transport: {{host: ADDRESS}}`, and name that",
            )
        key = _file(how.key, "transport.key")
        return Ssh(
            host=how.host,
            port=how.port,
            user=how.user,
            key=key,
            known_hosts=Path(how.known_hosts).expanduser() if how.known_hosts is not None else None,
            host_key=how.host_key,
            python=how.python or "python3",
            folder=how.folder or "~/.cache/compress",
        )
    if how.kind == "adb":
        from compress.exporters.bench.adb import Adb

        return Adb(
            serial=how.serial,
            python=how.python,
            benchmark=how.benchmark,
            **{"folder": how.folder} if how.folder is not None else {},
        )
    from compress.exporters.bench.local import Local

    return Local(title=target.name)


def _file(path: str | None, key: str) -> Path | None:
    found = Path(path).expanduser() if path is not None else None
    if found is not None and not found.is_file():
        raise UsageError("there is no such file", where=f"{key}: {path}", fix="check the path")
    return found

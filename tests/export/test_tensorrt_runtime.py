"""How an engine is run, against stand-ins: there is no GPU here, so neither a driver nor TensorRT's runtime can be had.

The driver is a C library made here, whose device memory is the host's: it proves the calls and their arguments. The
engine multiplies by two through the addresses it is given, as the real one would read and write them. What a real GPU
computes is not proven by this.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compress.exporters import runtimes
from compress.exporters.runtimes import CannotRun, Missing, load

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")

DRIVER = """
#include <stdlib.h>
#include <string.h>
typedef unsigned long long ptr;
int live = 0;
int cuInit(unsigned f) { return 0; }
int cuDeviceGet(int *d, int n) { *d = n; return n > 0 ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = &live; return 0; }
int cuCtxSetCurrent(void *c) { return c == &live ? 0 : 201; }
int cuMemAlloc_v2(ptr *p, size_t n) { live++; *p = (ptr)malloc(n); return n ? 0 : 1; }
int cuMemFree_v2(ptr p) { live--; free((void *)p); return 0; }
int cuMemcpyHtoDAsync_v2(ptr d, const void *s, size_t n, void *st) { memcpy((void *)d, s, n); return st ? 0 : 400; }
int cuMemcpyDtoHAsync_v2(void *d, ptr s, size_t n, void *st) { memcpy(d, (void *)s, n); return st ? 0 : 400; }
int cuStreamCreate(void **s, unsigned f) { *s = malloc(1); return f == 1 ? 0 : 1; }
int cuStreamSynchronize(void *s) { return s ? 0 : 400; }
int cuEventCreate(void **e, unsigned f) { *e = malloc(1); return 0; }
int cuEventRecord(void *e, void *s) { return e && s ? 0 : 400; }
int cuEventElapsedTime(float *ms, void *a, void *b) { *ms = 2.5f; return 0; }
int cuGetErrorString(int e, const char **t) { *t = "invalid device ordinal"; return 0; }
"""


class Context:
    """Gives y = 2 x by the addresses."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return index == 0 and bool(stream)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def execute_async_v3(self, stream: int) -> bool:
        count = int(np.prod(self.shape))
        x, y = (
            np.ctypeslib.as_array(ctypes.cast(self.addresses[n], ctypes.POINTER(ctypes.c_float)), (count,))
            for n in ("x", "y")
        )
        y[:] = 2 * x
        return bool(stream)


class Engine:
    num_optimization_profiles, num_io_tensors = 1, 2

    def get_tensor_name(self, i: int) -> str:
        return "xy"[i]

    def get_tensor_mode(self, name: str) -> str:
        return {"x": "in", "y": "out"}[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3)

    def get_tensor_dtype(self, name: str) -> str:
        return "float32"

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 3), (2, 3), (4, 3)]

    def create_execution_context(self) -> Context:
        return Context()


class Logger:
    INTERNAL_ERROR, ERROR = 0, 1

    def __init__(self) -> None:
        pass


@pytest.fixture
def stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    real = ctypes.CDLL
    monkeypatch.setattr(runtimes.ctypes, "CDLL", lambda name: real(str(library)))
    engine = SimpleNamespace(deserialize_cuda_engine=lambda data: Engine() if data == b"engine" else None)
    module: Any = SimpleNamespace(
        __name__="tensorrt",
        __version__="0",
        ILogger=Logger,
        Runtime=lambda log: engine,
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        TensorLocation=SimpleNamespace(HOST="host"),
        nptype=lambda kind: kind,
    )
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    (tmp_path / "m.engine").write_bytes(b"engine")
    return tmp_path


def test_inputs_are_placed_once_and_outputs_come_back(stands_in: Path) -> None:
    runner = load("tensorrt", str(stands_in / "m.engine"))
    assert [tuple(v) for v in runner.inputs] == [("x", (None, 3), "float32")]
    for batch in (4, 1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 3)).astype(np.float32)
        np.testing.assert_array_equal(runner.run({"x": x})["y"], 2 * x)
    call = runner.prepare({"x": x})
    call()
    assert runner.device_seconds is not None and runner.device_seconds() == pytest.approx(0.0025)


def test_a_shape_outside_the_profile_is_refused_before_it_runs(stands_in: Path) -> None:
    runner = load("tensorrt", str(stands_in / "m.engine"))
    with pytest.raises(
        CannotRun, match=r"the shape \(5, 3\) of x lies outside the engine's profile: \(1, 3\) to \(4, 3\)"
    ):
        runner.run({"x": np.zeros((5, 3), np.float32)})


def test_an_engine_for_other_gpus_is_not_at_fault(stands_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine cannot run on this GPU, which has"
        " compute capability 9.0. Supported compute capabilities: 8.0 8.6 8.9 12.0. TensorRT-RTX does not support this"
    )  # as TensorRT-RTX 1.7 says it on an H100
    monkeypatch.setattr(runtimes, "trt_logger", lambda trt: SimpleNamespace(last=said))
    (stands_in / "other").write_bytes(b"for others")
    with pytest.raises(Missing, match=r"capability 9\.0, the engine was built for 8\.0, 8\.6, 8\.9, 12\.0$"):
        load("tensorrt", str(stands_in / "other"))


def test_what_is_no_engine_or_no_device_is_said(stands_in: Path) -> None:
    (stands_in / "other").write_bytes(b"no engine")
    with pytest.raises(CannotRun, match="cannot load other"):
        load("tensorrt", str(stands_in / "other"))
    with pytest.raises(CannotRun, match="has 1 optimisation profiles, no 2"):
        load("tensorrt", str(stands_in / "m.engine"), profile=2)
    with pytest.raises(CannotRun, match="cuda_graph and runtime_cache are options of tensorrt_rtx"):
        load("tensorrt", str(stands_in / "m.engine"), cuda_graph=True)
    with pytest.raises(Missing, match=r"no CUDA device 1 here: .*invalid device ordinal"):
        load("tensorrt", str(stands_in / "m.engine"), device=1)

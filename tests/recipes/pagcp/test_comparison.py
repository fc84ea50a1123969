"""The comparison on real images, here on shapes: its rows do not touch one another."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.networks import shape_data
from tests.pagcp_round import Small
from tools import compare_pagcp


@pytest.mark.parametrize("method", ["uniform L1", "global L1", "PAGCP, l1", "PAGCP, trials"])
def test_a_row_leaves_the_dense_network_that_all_rows_share_as_it_was(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shape_data(multitask=True)
    monkeypatch.setattr(compare_pagcp, "AFTER", 1)
    monkeypatch.setattr(compare_pagcp, "TASKS", [t.name for t in data.tasks])
    torch.manual_seed(0)
    dense = Small().eval()
    before = copy.deepcopy(dense.state_dict())
    found = compare_pagcp.row(method, dense, data, 0.05, 0, tmp_path)
    assert found["removed"] >= 0.05 and set(found["after"]) == {"shape", "matte"}
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())

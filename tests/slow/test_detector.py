"""A detector that is trained for half a minute finds most of what it has never seen."""

from __future__ import annotations

import pytest

from compress.models.zoo import build
from compress.networks.train import evaluate, train
from compress.schema.sections import TrainSpec
from tests.models.zoo.test_multitask import scene_data


@pytest.mark.slow
def test_the_detector_finds_most_objects_of_unseen_scenes() -> None:
    data = scene_data(500, 60)
    model = build("detector", {"widths": [8, 16, 32, 64], "classes": 3})
    before = evaluate(model, data, data.test)["boxes"]["map50"]
    spec = TrainSpec(epochs=32, batch=16, lr=4e-3, optimizer="adam", warmup_epochs=1, flip=True, shift=4)
    train(model, data, spec)
    after = evaluate(model, data, data.test)["boxes"]["map50"]
    assert before < 0.02 and after > 0.75, (before, after)

"""Trains a named network on its own data and prints what every task measures on the test split.

PYTHONPATH=. python tools/train_network.py multitask-resnet-emoji --spec '{epochs: 18, lr: 0.05, batch: 64,
    nesterov: true, weight_decay: 0.0005, warmup_epochs: 1, shift: 2}'
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import yaml

from compress.data.images import load
from compress.models.sources import network_alias
from compress.models.zoo import build
from compress.networks.flops import count_flops
from compress.networks.train import evaluate, train
from compress.processes.distributed import device
from compress.schema.sections import DataSpec, TrainSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--spec", required=True, help="how it is trained, as a recipe's section train, in YAML")
    parser.add_argument("--data", default="{}", help="laid over the network's own data, in YAML")
    parser.add_argument("--arguments", default="{}", help="laid over the network's own arguments, in YAML")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    alias = network_alias(words.network)
    data = load(DataSpec.model_validate({**alias.data, **yaml.safe_load(words.data)}))
    model = build(alias.network, {**alias.arguments, **yaml.safe_load(words.arguments)}, words.seed)
    flops = sum(layer.dense for layer in count_flops(model.eval(), torch.zeros(1, *data.input_shape)))
    began = time.process_time()
    _, rows = train(model.to(device()), data, TrainSpec.model_validate(yaml.safe_load(words.spec)), seed=words.seed)
    facts = {
        "network": words.network,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": flops,
        "cpu_seconds": round(time.process_time() - began, 1),
        "training": rows,
        "test": evaluate(model, data, data.test),
        "metrics": {t.name: {"metric": t.metric, "higher_is_better": t.higher_is_better} for t in data.tasks},
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()

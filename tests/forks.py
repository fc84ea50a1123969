"""Processes for tests, forked from one that has loaded what they all need: a kill then falls into the work.

There is one such server in a process, and it loads what was asked for last before its first fork: so it is asked here.
"""

from __future__ import annotations

import multiprocessing

Process = multiprocessing.process.BaseProcess
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "tests.command",
        "tests.networks",
        "compress.pipeline",
        "compress.recipes.tyr.prune",
        "compress.recipes.global_mp.network_stages",
        "compress.language.recover",
        "compress.networks.train",
        "compress.models.zoo.resnet32",
        "transformers",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "peft",
    ]
)

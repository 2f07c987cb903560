"""What the fork server loads, so that every engine forked from it has it.

Importing this module is its only use, since that is all a fork server does. The garbage collector rests meanwhile,
and afterwards leaves alone what is loaded; whoever is forked switches it on.
"""

from __future__ import annotations

import gc
import importlib

_MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "llmserve.workers.connector.connector",
    "llmserve.workers.engine.vllm_executor",
)

gc.disable()
for _name in _MODULES:
    importlib.import_module(_name)
gc.freeze()

"""Figures of other engines and kernels (peers.json), and the scripts that measure them."""

import json
from pathlib import Path
from typing import Any

_PEERS = json.loads((Path(__file__).parent / "peers.json").read_text())

SERVING: dict[str, dict[str, Any]] = _PEERS["serving"]
"""Engine -> its "settings", the "source" of its figures, and its "figures" by model and name."""

KERNELS: dict[str, Any] = _PEERS["attention_kernels"]

KV_ON_HOST: dict[str, dict[str, Any]] = _PEERS["kv_on_host"]
"""Engine -> the same, for decodes whose KV is in host memory."""


def serving_figures(model: str) -> dict[str, dict[str, float]]:
    """Engine -> its figures by name, for every engine measured on a model's shapes."""
    return {engine: peer["figures"][model] for engine, peer in SERVING.items() if model in peer["figures"]}

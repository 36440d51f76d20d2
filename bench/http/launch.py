"""Starts the server in a process of its own, and reads its figures."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.http.connection import Client
from bench.workloads import Workload, sharegpt

_SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_BOUND = re.compile(r'le="([^"]+)"')


@dataclass(frozen=True, slots=True)
class Launch:
    """The server to start.

    Args:
        device: "cpu" keeps JAX off any accelerator.
        commit: the commit to record; None asks git.
        model: directory of a checkpoint; None is the model in the box.
        random_weights: directory of a config.json, for random weights in its shapes.
        engine: settings of the engine.
        server: settings of the server.
        workload: arguments of ``bench.workloads.sharegpt``; they are computed by ``LLM.generate`` first.
    """

    device: str
    commit: str | None = None
    model: str | None = None
    random_weights: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] | None = None


def workload_of(fields: dict[str, Any], vocab_size: int) -> Workload:
    """The requests of a ``Launch``, equal in all processes."""
    return sharegpt(**fields, vocab_size=vocab_size)


class Child:
    """A server that runs.

    Attributes:
        said: all that it told, by name.
        address: its host and port.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.said: dict[str, Any] = {}
        self._read_until("address")
        url = urlsplit(self.said["address"])
        assert url.hostname is not None
        assert url.port is not None
        self.address = url.hostname, url.port

    def state(self) -> dict[str, Any]:
        """Its memory, files, tasks and blocks now."""
        self._process.send_signal(signal.SIGUSR1)
        self._read_until("state")
        return self.said.pop("state")

    def stop(self) -> None:
        """Tell it to end, once what runs has ended."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int:
        """The status that it ends with."""
        return self._process.wait(timeout_s)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def _read_until(self, name: str) -> None:
        assert self._process.stdout is not None
        while name not in self.said:
            line = self._process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server ended with status {self._process.wait()} before it told its {name}")
            self.said |= json.loads(line)


@contextmanager
def launched(launch: Launch) -> Iterator[Child]:
    """A server, which ends with the block.

    Raises:
        RuntimeError: it ended before it took requests.
    """
    command = [sys.executable, "-m", "bench.http.child", json.dumps(asdict(launch))]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    try:
        yield Child(process)
    finally:
        process.kill()
        process.communicate()


class Metrics:
    """The figures of /metrics at one moment."""

    def __init__(self, text: str) -> None:
        self.samples = [(name, labels or "", float(value)) for name, labels, value in _SAMPLE.findall(text)]

    @classmethod
    async def read(cls, client: Client) -> "Metrics":
        return cls((await client.get("/metrics")).body.decode())

    def total(self, name: str) -> float:
        """The sum of a family's samples."""
        return sum(value for each, _, value in self.samples if each == name)

    def mean_since(self, before: "Metrics", name: str) -> float | None:
        """Mean of a histogram's values since then; None without any."""
        counts = self.total(f"{name}_count") - before.total(f"{name}_count")
        return (self.total(f"{name}_sum") - before.total(f"{name}_sum")) / counts if counts else None

    def quantile_since(self, before: "Metrics", name: str, fraction: float) -> float | None:
        """Upper bound of the bucket that has the quantile of a histogram's values since then; None without any."""
        counts = self._counts_since(before, name)
        wanted = fraction * max(counts.values(), default=0)
        return next((bound for bound, count in sorted(counts.items()) if count and count >= wanted), None)

    def histogram_since(self, before: "Metrics", name: str) -> dict[float, int]:
        """Number of a histogram's values since then in each bucket that has any, by its upper bound."""
        found, below = {}, 0
        for bound, count in sorted(self._counts_since(before, name).items()):
            if count > below:
                found[bound] = int(count - below)
            below = count
        return found

    def _counts_since(self, before: "Metrics", name: str) -> dict[float, float]:
        """Number of a histogram's values since then up to each bound."""
        counts = self._buckets(name)
        for bound, count in before._buckets(name).items():
            counts[bound] -= count
        return counts

    def _buckets(self, name: str) -> dict[float, float]:
        found = [(_BOUND.search(labels), value) for each, labels, value in self.samples if each == f"{name}_bucket"]
        return {float(bound[1].replace("+Inf", "inf")): value for bound, value in found if bound is not None}

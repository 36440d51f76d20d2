"""Several processes run one model, each with devices of its own: the first leads, the others follow.

JAX brings the processes together (``jax.distributed``), and its collectives carry the results of a step. The leading
process describes each step in one message, the only traffic between the hosts (PagedAttention, section 4.6).
"""

import atexit
import itertools
import json
import logging
import os
import pickle
import secrets
import socket
import struct
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from enum import Enum, auto
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any

import jax
from flax import nnx
from jax._src import distributed  # the only place where JAX keeps the address of the leading process
from jax.sharding import Mesh

from jpaged.config import EngineConfig
from jpaged.device.runner import ModelRunner, Results
from jpaged.device.step.pack import PackedStep
from jpaged.interrupts import InterruptsWait, interruptible
from jpaged.models import ModelConfig

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 10

CONNECT_TIMEOUT_S = 600
"""Seconds that the processes wait for the slowest of them."""


class ProcessLostError(OSError):
    """A process has ended, and the others cannot go on without it."""


class Command(Enum):
    """Messages of the leading process besides steps."""

    FORGET_POOL = auto()
    MEASURE_PROFILE = auto()
    END = auto()


def join_processes(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Bring the processes together, before JAX is used for anything else.

    Args:
        coordinator_address: host and port of process 0. All three are None on Cloud TPU, on Slurm and wherever else
            JAX finds them by itself.
        num_processes: number of processes.
        process_id: number of this process, from 0.

    Raises:
        ValueError: one is given and another is not, or JAX cannot find them.
    """
    given = coordinator_address, num_processes, process_id
    if any(value is None for value in given) and any(value is not None for value in given):
        raise ValueError(
            f"coordinator_address={coordinator_address!r}, num_processes={num_processes}, process_id={process_id}: "
            "give all three, or none where JAX knows them (Cloud TPU, Slurm)"
        )
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except ValueError as error:
        raise ValueError(
            f"the processes cannot be brought together ({error}): give coordinator_address, num_processes and "
            "process_id"
        ) from error


class Channel:
    """Messages from the leading process, process 0, to all others: each gets all of them, in order.

    All processes make their channels at the same time. Messages are pickled. ``jax.distributed`` gives the processes a
    key, and a connection without this key is refused.

    Attributes:
        is_leader: whether this process leads.
    """

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.is_leader = jax.process_index() == 0
        self._is_closed = False
        client, name = distributed.global_state.client, f"jpaged/channel/{next(Channel._numbers)}"
        assert client is not None
        if self.is_leader:
            with interruptible():
                self._connections = _accept(client, name, jax.process_count() - 1)
            self._thread = ThreadPoolExecutor(max_workers=1)  # a step does not wait until its message is sent
            self._sending: Future[None] | None = None
        else:
            with interruptible():
                self._connections = [_connect(client, name)]

    def send(self, message: Any) -> None:
        """Send a message from the leading process.

        Raises:
            ProcessLostError: an earlier message could not be sent.
            RuntimeError: the channel was closed.
        """
        if self._is_closed:
            raise RuntimeError("this LLM was closed: make another one, in all processes")
        if self._sending is not None and self._sending.done():
            self._sending.result()
        self._sending = self._thread.submit(self._send, pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))

    def _send(self, data: bytes) -> None:
        """Send to every process that is left, even if one is lost."""
        lost = []
        for connection in self._connections:
            try:
                connection.send_bytes(data)
            except OSError as error:
                lost.append(error)
        if lost:
            raise ProcessLostError(_LOST) from lost[0]

    def receive(self) -> Any:
        """The next message.

        Raises:
            ProcessLostError: the leading process has ended.
        """
        try:
            with interruptible():
                data = self._connections[0].recv_bytes()
            return pickle.loads(data)
        except (EOFError, OSError) as error:
            raise ProcessLostError(_LOST) from error

    def gather(self, message: Any) -> list[Any]:
        """The messages of all processes, in order. All processes call this at the same time.

        Raises:
            ProcessLostError: a process has ended.
        """
        try:
            if not self.is_leader:
                self._connections[0].send(message)
                return self.receive()
            with interruptible():
                gathered = [message, *(connection.recv() for connection in self._connections)]
        except (EOFError, OSError) as error:
            raise ProcessLostError(_LOST) from error
        self.send(gathered)
        return gathered

    def least(self, number: int) -> int:
        """The least of the numbers of all processes. All processes call this at the same time."""
        return min(self.gather(number))

    def end(self) -> None:
        """Tell the others, from the leading process, that there is no more to do."""
        if not self._is_closed:
            self._thread.shutdown()
            with suppress(ProcessLostError):  # a lost process needs no message
                self._send(pickle.dumps(Command.END))  # in this thread: none starts while the interpreter ends
            self.close()

    def close(self) -> None:
        """Close the connections: a process that waits for a message of this one gets an error."""
        if self.is_leader:
            self._thread.shutdown()
        for connection in self._connections:
            connection.close()
        self._is_closed = True


_LOST = "another process has ended, and its own output says why: start all of them again"


def _accept(client: Any, name: str, num_followers: int) -> list[Connection]:
    """A connection to each of the other processes."""
    key, connections, stop = secrets.token_bytes(32), [], time.monotonic() + CONNECT_TIMEOUT_S
    with socket.create_server(("", 0), backlog=num_followers) as server:
        client.key_value_set(name, json.dumps({"port": server.getsockname()[1], "key": key.hex()}))
        while len(connections) < num_followers:
            server.settimeout(max(stop - time.monotonic(), 0.001))
            try:
                accepted, _ = server.accept()
            except TimeoutError as error:
                raise ProcessLostError(
                    f"{len(connections)} of {num_followers} other processes connected within {CONNECT_TIMEOUT_S} s: "
                    "start the same command on every host, and let the hosts connect to each other"
                ) from error
            with suppress(AuthenticationError, EOFError, OSError):  # a stranger connected
                connections.append(_shake_hands(accepted, key))
    return connections


def _shake_hands(accepted: socket.socket, key: bytes) -> Connection:
    """The connection, once both sides have shown that they know the key. A silent stranger times out."""
    accepted.settimeout(None)
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", HANDSHAKE_TIMEOUT_S, 0))
    connection = Connection(os.dup(accepted.fileno()))
    try:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
    except BaseException:
        connection.close()
        raise
    finally:
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
        accepted.close()
    return connection


def _connect(client: Any, name: str) -> Connection:
    """A connection to the leading process, whose port JAX's key-value store has."""
    found = json.loads(client.blocking_key_value_get(name, CONNECT_TIMEOUT_S * 1000))
    address = distributed.global_state.coordinator_address
    assert address is not None
    host = address.rpartition(":")[0]
    connection = Client((host, found["port"]), family="AF_INET", authkey=bytes.fromhex(found["key"]))
    # A large message is sent in two parts, and the second would wait until the first is acknowledged.
    with socket.socket(fileno=os.dup(connection.fileno())) as opened:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class LeadingRunner(ModelRunner):
    """The runner of the leading process. It tells the others to do whatever it does."""

    def __init__(
        self,
        model: nnx.Module,
        model_config: ModelConfig,
        config: EngineConfig,
        mesh: Mesh,
        *,
        channel: Channel,
        warm_up: bool = False,
        use_tqdm: bool = True,
    ):
        self._channel = channel
        self.close = weakref.finalize(self, channel.end)
        """Tell the others that there is no more to do, at the latest when this object is collected."""
        atexit.register(self.close)  # JAX then waits for the others, which must not wait for this process
        super().__init__(model, model_config, config, mesh, channel=channel, warm_up=warm_up, use_tqdm=use_tqdm)

    def start(self, step: PackedStep) -> Results:
        with InterruptsWait():  # the others do the whole step
            self._channel.send(step)
            return super().start(step)

    def forget_pool(self) -> None:
        self._channel.send(Command.FORGET_POOL)
        super().forget_pool()

    def measure_profile(self) -> None:
        with InterruptsWait():
            self._channel.send(Command.MEASURE_PROFILE)
            super().measure_profile()


def follow(runner: ModelRunner, channel: Channel) -> None:
    """Do what the leading process says until it has no more to do.

    A step that fails here fails in the leading process too, whose next message is then ``FORGET_POOL``. If any other
    message follows, this process ends at once: the others would wait for collectives that it no longer joins.

    Raises:
        ProcessLostError: the leading process ended without a message.
    """
    failure: Exception | None = None
    with closing(channel):
        while (message := channel.receive()) is not Command.END:
            if failure is not None and message is not Command.FORGET_POOL:
                log.error("this process failed in a step that the leading one made, and ends", exc_info=failure)
                os._exit(1)
            failure = None
            match message:
                case PackedStep() as step:
                    try:
                        runner.start(step)
                    except Exception as error:
                        failure = error
                case Command.FORGET_POOL:
                    runner.forget_pool()
                case Command.MEASURE_PROFILE:
                    runner.measure_profile()


def agree(channel: Channel, **settings: object) -> None:
    """Check that all processes were started with the same settings.

    Raises:
        ValueError: in all processes, if the settings of two differ; names the setting.
    """
    own = {name: repr(value) for name, value in settings.items()}
    for process_id, theirs in enumerate(channel.gather(own)):
        for name, value in theirs.items():
            if value != own[name]:
                raise ValueError(
                    f"process {process_id} has {name}={value}, process {jax.process_index()} has {own[name]}: start "
                    "all processes with the same settings and checkpoint"
                )


def open_channel(mesh: Mesh) -> Channel | None:
    """The channel between the processes that own the devices of a mesh; None for a single process.

    Raises:
        ValueError: a process owns none of these devices.
    """
    num_processes = len({device.process_index for device in mesh.devices.flat})
    if num_processes == 1:
        return None
    if num_processes < jax.process_count():
        raise ValueError(f"the mesh has devices of {num_processes} of {jax.process_count()} processes: give it all")
    return Channel()

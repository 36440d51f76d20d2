"""Several processes run one model, each with devices of its own: the first decides, the others do as it says.

JAX brings them together (``jax.distributed``), and its collectives carry what steps compute. What a step is, the
leading process says in one message, which is all that they send each other on the host (vLLM, section 4.6).
"""

import atexit
import itertools
import json
import os
import pickle
import secrets
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from enum import Enum, auto
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import jax
from jax._src import distributed  # who the leader is and what a follower needs to find it, JAX says nowhere else
from jax.sharding import Mesh

from jpaged.device.model_runner import ModelRunner, Results
from jpaged.device.packed_step import PackedStep

CONNECT_TIMEOUT_S = 600
"""For the slowest process to get as far as the others."""


class Command(Enum):
    """What the leading process says besides steps."""

    FORGET_POOL = auto()
    MEASURE_COSTS = auto()
    END = auto()


def join_processes(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Bring the processes together, before anything else is asked of JAX.

    Args:
        coordinator_address: host and port of process 0. With the others None on Cloud TPU, Slurm and wherever else JAX
            finds them out by itself.
        num_processes: of them all.
        process_id: of this one, from 0.

    Raises:
        ValueError: some are given and others are not, or they cannot be found out.
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
    """Messages from the leading process, which is process 0, to all others: each gets all of them, in order.

    All processes make theirs at the same time. Messages are pickled, and those who do not know a key that
    ``jax.distributed`` has told the processes are not listened to.

    Attributes:
        is_leader: whether this process leads.
    """

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.is_leader = jax.process_index() == 0
        client, name = distributed.global_state.client, f"jpaged/channel/{next(Channel._numbers)}"
        assert client is not None
        if self.is_leader:
            self._connections = _accept(client, name, jax.process_count() - 1)
            self._thread = ThreadPoolExecutor(max_workers=1)  # a step does not wait until its message is on its way
            self._sending: Future[None] | None = None
        else:
            self._connections = [_connect(client, name)]

    def send(self, message: Any) -> None:
        """From the leading process.

        Raises:
            OSError: an earlier message could not be sent: a process has ended.
        """
        if self._sending is not None and self._sending.done():
            self._sending.result()
        self._sending = self._thread.submit(self._send, pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))

    def _send(self, data: bytes) -> None:
        for connection in self._connections:
            connection.send_bytes(data)

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: the leading process has ended.
        """
        return pickle.loads(self._connections[0].recv_bytes())

    def gather(self, message: Any) -> list[Any]:
        """The messages of all processes, the leading one's first; all of them ask at the same time.

        Raises:
            EOFError: one of them has ended.
        """
        if not self.is_leader:
            self._connections[0].send(message)
            return self.receive()
        try:
            gathered = [message, *(connection.recv() for connection in self._connections)]
        except EOFError as error:
            raise EOFError("another process has ended: its own output says why") from error
        self.send(gathered)
        return gathered

    def least(self, number: int) -> int:
        """The least of the numbers that the processes ask for, all at the same time."""
        return min(self.gather(number))

    def end(self) -> None:
        """From the leading process: there is no more to do."""
        self._thread.shutdown()
        self._send(pickle.dumps(Command.END))  # by this thread: no other starts while the interpreter ends
        self.close()

    def close(self) -> None:
        """Listen no more; whoever waits for a message of this process learns that there will be none."""
        if self.is_leader:
            self._thread.shutdown()
        for connection in self._connections:
            connection.close()


def _accept(client: Any, name: str, num_followers: int) -> list[Connection]:
    """A connection to each of the others."""
    key, connections = secrets.token_bytes(32), []
    with Listener(("", 0), family="AF_INET", backlog=num_followers, authkey=key) as listener:
        client.key_value_set(name, json.dumps({"port": listener.address[1], "key": key.hex()}))
        while len(connections) < num_followers:
            try:
                connections.append(_without_delay(listener.accept()))
            except (AuthenticationError, OSError):  # somebody else's; whoever of ours is missing, JAX reports
                continue
    return connections


def _connect(client: Any, name: str) -> Connection:
    """A connection to the leading process, which has told JAX's where to find it."""
    found = json.loads(client.blocking_key_value_get(name, CONNECT_TIMEOUT_S * 1000))
    address = distributed.global_state.coordinator_address
    assert address is not None
    host = address.rpartition(":")[0].strip("[]")
    return _without_delay(Client((host, found["port"]), family="AF_INET", authkey=bytes.fromhex(found["key"])))


def _without_delay(connection: Connection) -> Connection:
    """A large message is sent in two parts, the second of which would wait for the first to be acknowledged."""
    with socket.socket(fileno=os.dup(connection.fileno())) as opened:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class LeadingRunner(ModelRunner):
    """The runner of the leading process: whatever it does, the others do too."""

    def __init__(self, *args: Any, channel: Channel, **options: Any):
        self._channel = channel
        self._is_over = False
        super().__init__(*args, channel=channel, **options)
        atexit.register(self.close)  # the others would wait for ever, and JAX for them

    def start(self, step: PackedStep) -> Results:
        self._channel.send(step)
        return super().start(step)

    def forget_pool(self) -> None:
        self._channel.send(Command.FORGET_POOL)
        super().forget_pool()

    def measure_costs(self) -> None:
        self._channel.send(Command.MEASURE_COSTS)
        super().measure_costs()

    def close(self) -> None:
        """Tell the others that there is no more to do."""
        if not self._is_over:
            self._is_over = True
            self._channel.end()
            atexit.unregister(self.close)


def follow(runner: ModelRunner, channel: Channel) -> None:
    """Do what the leading process says until it has no more to say.

    Raises:
        EOFError: it ended without saying so.
    """
    with closing(channel):
        while (message := channel.receive()) is not Command.END:
            match message:
                case PackedStep() as step:
                    runner.start(step)
                case Command.FORGET_POOL:
                    runner.forget_pool()
                case Command.MEASURE_COSTS:
                    runner.measure_costs()


def agree(channel: Channel, **settings: object) -> None:
    """Check that all processes were started with the same settings.

    Raises:
        ValueError: in all of them, if one was not; names what differs.
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
    """The channel between the processes that the devices of a mesh belong to; None for a single one."""
    return Channel() if len({device.process_index for device in mesh.devices.flat}) > 1 else None

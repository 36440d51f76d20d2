"""Chat templates rendered in a process of its own, which ends with a template that takes too long.

That process runs this file, which therefore imports nothing of jpaged.
"""

import json
import os
import resource
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import closing, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RENDER_TIMEOUT_S = 5.0
"""Time that a template gets for one conversation."""

START_TIMEOUT_S = 120.0
"""Time that the process gets to start, which takes about a second."""

MAX_RENDER_BYTES = 1 << 30
"""Memory that the process may take beyond that of its libraries."""

_READY = b"ready"


class TemplateProcess:
    """Renders a Jinja template with Hugging Face's own function, of ``apply_chat_template``.

    The sandbox of that function bounds neither the time nor the memory of a template. Any thread may call the methods;
    conversations wait for each other.

    Args:
        template: the template.
        timeout_s: seconds for one conversation.
    """

    def __init__(self, template: str, timeout_s: float = RENDER_TIMEOUT_S) -> None:
        self._template = template
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def start(self) -> None:
        """Start the process, unless it runs. Does not wait until it is ready."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """End the process, and refuse the conversation that it renders. A later call starts another process."""
        if (child := self._child) is not None:
            child.end()

    def render(self, messages: list[dict[str, Any]], arguments: Mapping[str, Any], most_characters: int) -> str:
        """The text of a conversation.

        Args:
            messages: the messages, as JSON has them.
            arguments: further arguments of ``render_jinja_template``, variables of the template among them.
            most_characters: characters that the text may have.

        Raises:
            ValueError: the template refuses the messages, or takes too much time or memory for them.
            RuntimeError: the process does not start.
        """
        call = {"conversations": [messages], "chat_template": self._template, **arguments}
        request = json.dumps([call, most_characters]).encode()
        with self._lock:
            child = self._running()
            child.wait_until_ready()
            answer = child.ask(request, self._timeout_s)
        if answer is None:
            raise ValueError(f"it takes more than {self._timeout_s:g} s, or more memory than it may")
        if (error := answer.get("error")) is not None:
            raise ValueError(error)
        return answer["text"]

    def _running(self) -> "_Child":
        if self._child is None or not self._child.is_alive:
            self._child = _Child()
        return self._child


class _Child:
    """One process, and the connection to it.

    Attributes:
        end: ends the process, at the latest when this object is collected.
    """

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        with closing(theirs):
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the server
            )
        self._is_ready = False
        self.end = weakref.finalize(self, _end, self._process)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Wait until the libraries are there. Raises RuntimeError if they do not come."""
        with suppress(EOFError, OSError):
            self._is_ready = self._is_ready or (
                self._connection.poll(START_TIMEOUT_S) and self._connection.recv_bytes() == _READY
            )
        if not self._is_ready:
            self.end()
            raise RuntimeError("the process that renders chat templates does not start")

    def ask(self, request: bytes, timeout_s: float) -> dict[str, Any] | None:
        """The answer; None if it does not come in time, or if the process ends. The process has then ended."""
        with suppress(EOFError, OSError):
            self._connection.send_bytes(request)
            if self._connection.poll(timeout_s):
                return json.loads(self._connection.recv_bytes())
        self.end()
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


# In the process -------------------------------------------------------------------------------------------------------


def _serve(connection: Connection) -> None:
    """Render until the other process closes the connection, or ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    with suppress(EOFError, OSError):
        connection.send_bytes(_READY)
        while True:
            call, most_characters = json.loads(connection.recv_bytes())
            try:
                [text], _ = render_jinja_template(**call)
                is_too_long = len(text) > most_characters
                answer = (
                    {"error": f"the text has more than {most_characters} characters"} if is_too_long else {"text": text}
                )
            except MemoryError:
                answer = {"error": "it takes more memory than it may"}
            except Exception as error:
                answer = {"error": str(error)[:500] or type(error).__name__}
            connection.send_bytes(json.dumps(answer).encode())


def _limit_memory() -> None:
    """Let allocations fail beyond what the libraries take, where the system says how much that is."""
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most_bytes = pages * os.sysconf("SC_PAGE_SIZE") + MAX_RENDER_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))

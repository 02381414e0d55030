"""Child processes for hostile input: limited in memory, killed at a deadline. Imports only the standard library.

Both sides exchange messages, JSON followed by bytes: nothing that comes back is unpickled.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

Message = tuple[dict[str, Any], bytes]
_LONGEST = 2**31  # bytes of the header or body of a message
_PIPE = 2**20  # bytes, the largest that Linux grants unprivileged users
_START_SECONDS = 60.0  # timeout for starting Python and the imports of a process
_START = (
    "import importlib, json, sys; words = json.loads(sys.argv[1]); sys.path[:] = words['path']; "
    "from dinoseg.extensions.serving.child import run; "
    "run(getattr(importlib.import_module(words['module']), words['function']), words['memory'])"
)


class ChildEnded(Exception):
    """The process has ended without an answer; `late`: whether it was killed at the deadline."""

    def __init__(self, timed_out: bool) -> None:
        super().__init__("too late" if timed_out else "ended")
        self.late = timed_out


class Child:
    """A process that answers messages; it starts in the background.

    Args:
        function: of a module, called in the process with a `Channel`.
        memory: bytes that it may allocate beyond the needs of its imports, where the system can limit that (Linux).
    """

    _timed_out = False
    _is_ready = False

    def __init__(self, function: Callable[["Channel"], None], memory: int) -> None:
        words = {"path": sys.path, "module": function.__module__, "function": function.__name__, "memory": memory}
        # library threads and their heaps would use up the limited address space
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
        self._process = subprocess.Popen(
            # -P: keeps the working folder off sys.path
            [sys.executable, *_interpreter_flags(), "-P", "-c", _START, json.dumps(words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **single},
            start_new_session=os.name == "posix",  # Ctrl-C reaches only the parent
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        for pipe in (self._process.stdin, self._process.stdout):
            _enlarge(pipe)
        self._channel = Channel(self._process.stdout, self._process.stdin)

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Kill the process after `seconds`, unless the block has ended by then.

        The time counts from when the process is ready, which may take it up to a minute.

        Raises:
            ChildEnded: if the process ended before it was ready.
        """
        if not self._is_ready:
            with self._killed_after(_START_SECONDS):
                self.receive()
            self._is_ready = True
        with self._killed_after(seconds):
            yield

    @contextmanager
    def _killed_after(self, seconds: float) -> Iterator[None]:
        timer = threading.Timer(seconds, self._kill_at_deadline)  # pipes have no portable timeout
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # from here on, `is_alive` shows whether it was killed

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Send a message.

        Raises:
            ChildEnded: if the process has ended.
        """
        try:
            self._channel.send(header, body)
        except (OSError, ValueError):  # its pipes are broken or closed
            raise self._end_with_error() from None

    def receive(self) -> Message:
        """Return the next message.

        Raises:
            ChildEnded: if the process has ended.
        """
        try:
            message = self._channel.receive()
        except (OSError, ValueError):
            message = None
        if message is None:
            raise self._end_with_error()
        return message

    @property
    def is_alive(self) -> bool:
        """True if the process has not ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Kill the process; no-op if it has ended."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Kill the process and close its pipes: pending reads and writes raise `ChildEnded`."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _kill_at_deadline(self) -> None:
        self._timed_out = True
        self.kill()

    def _end_with_error(self) -> ChildEnded:
        self.kill()
        return ChildEnded(self._timed_out)


class Channel:
    """One end of a pair of pipes that carry messages."""

    def __init__(self, source: IO[bytes], target: IO[bytes]) -> None:
        self._source, self._target = source, target

    def send(self, header: dict[str, Any], body: bytes | memoryview = b"") -> None:
        """Send a message.

        Raises:
            OSError: if the other end is closed.
        """
        text = json.dumps(header).encode()
        self._target.write(len(text).to_bytes(8, "big") + len(body).to_bytes(8, "big") + text)
        self._target.write(body)
        self._target.flush()

    def receive(self) -> Message | None:
        """Return the next message; None if the other side has ended."""
        sizes = self._source.read(16)
        lengths = int.from_bytes(sizes[:8], "big"), int.from_bytes(sizes[8:], "big")
        if len(sizes) < 16 or max(lengths) > _LONGEST:
            return None
        text, body = self._source.read(lengths[0]), self._source.read(lengths[1])
        if (len(text), len(body)) != lengths:
            return None
        try:
            header = json.loads(text)
        except ValueError:
            return None
        return (header, body) if isinstance(header, dict) else None


def run(function: Callable[[Channel], None], memory: int) -> None:
    """Run a function in a process of `Child`, with limited memory and standard output reserved for the channel."""
    try:
        os.fstat(2)
    except OSError:  # the parent has closed its standard error, as some daemons do
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    channel = Channel(sys.stdin.buffer, os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # libraries that print must not corrupt the messages
    _bound_memory(memory)
    with suppress(BrokenPipeError):
        channel.send({"ready": True})
        function(channel)


def _interpreter_flags() -> list[str]:
    """Return the flags with which this interpreter was started, such as -I and -X utf8."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return flags


def _enlarge(pipe: IO[bytes]) -> None:
    """Enlarge a pipe's buffer, where supported (Linux), so that the processes switch less often."""
    try:
        import fcntl

        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)  # type: ignore[attr-defined, unused-ignore]
    except (ImportError, AttributeError, OSError):
        return


def _bound_memory(more: int) -> None:
    """Let allocations fail that exceed this process's current memory by more than `more` bytes."""
    if sys.platform == "win32":  # only the deadline applies, as on macOS
        return
    import resource

    try:
        with open("/proc/self/statm", encoding="utf-8") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = taken + more
    resource.setrlimit(resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))

"""Work that waits for the lock of another run."""

import threading
from contextlib import contextmanager

from dinoseg.utils.locks import hold_lock


@contextmanager
def start_behind_lock(path, caplog, act, *given, **named):
    """Call a function in a thread while a lock is held: it waits during the block, and has ended after it."""
    waiting = threading.Thread(target=act, args=given, kwargs=named)
    with hold_lock(path):
        waiting.start()
        while "waiting for it" not in caplog.text:
            assert waiting.is_alive()
        yield
    waiting.join(60)
    assert not waiting.is_alive()

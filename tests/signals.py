"""Signals that another thread receives: Python runs their handlers in the main thread nevertheless."""

import signal
import threading


def signal_in_thread(number):
    """Let a second thread receive a signal, whatever this one blocks; its handler is due when this returns."""

    def receive():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        signal.pthread_kill(threading.get_ident(), number)

    thread = threading.Thread(target=receive)
    thread.start()
    thread.join()

"""Functions that tests run in a process of `Child`."""

import os
import time


def echo(channel):
    """Answer each message with itself, and print what is no message."""
    os.write(1, b"printed by a library")
    while (message := channel.receive()) is not None:
        channel.send(*message)


def stuck(channel):
    """Answer the first message with a number of pixels, and then never again."""
    channel.receive()
    channel.send({"pixels": 1})
    time.sleep(600)

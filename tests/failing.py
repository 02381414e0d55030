"""Functions that break down in the middle, as a full disk or a kill makes them."""

import subprocess
import sys


def fail_after(patch, module, name, count, error):
    """Let a module's function work so many times, and raise an error from then on."""
    real = getattr(module, name)
    left = [count]

    def call(*given, **named):
        if not left[0]:
            raise error
        left[0] -= 1
        return real(*given, **named)

    patch.setattr(module, name, call)


def run_until_written(module, call, count):
    """Start a preparation in a process; return it when it has written `count` images and stops before the next."""
    code = f"""
import time
from dinoseg.extensions.prepare import {module}
write, written = {module}.write_png, []
def write_few(*given, **named):
    if len(written) == {count}:
        print("written", flush=True)
        time.sleep(600)
    write(*given, **named)
    written.append(given)
{module}.write_png = write_few
{module}.{call}
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"written\n"
    process.stdout.close()
    return process

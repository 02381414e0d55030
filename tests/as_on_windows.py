"""Run commands of dinoseg with what Windows offers: `python as_on_windows.py FOLDER` prints each command's status.

Only modules of dinoseg see the stand-ins (`os`, `signal`, `sys` ...): other libraries have builds for Windows.
Open or mapped files can be neither removed, renamed nor replaced; processes are spawned.
"""

import builtins
import errno
import importlib
import multiprocessing.context
import os
import pathlib
import pkgutil
import signal
import sys
import types
from fcntl import F_GETFL, LOCK_EX, LOCK_NB, fcntl, flock

import psutil

MODULES = "crypt curses fcntl grp nis posix pty pwd readline resource spwd syslog termios triton tty".split()
OS = """chown chroot copy_file_range eventfd fchdir fchmod fchown fdatasync fork forkpty fstatvfs getegid geteuid getgid
    getgroups getloadavg getpgid getpgrp getpriority getrandom getsid getuid killpg lchown lockf makedev memfd_create
    mkfifo mknod nice openpty pathconf pidfd_open pipe2 posix_fadvise posix_fallocate posix_spawn pread preadv pwrite
    pwritev readv writev register_at_fork sched_getaffinity sched_setaffinity sched_yield sendfile set_blocking setpgid
    setpriority setsid setuid splice statvfs sync sysconf sysconf_names tcgetpgrp ttyname uname wait wait3 wait4 waitid
    O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC POSIX_FADV_DONTNEED WIFEXITED WNOHANG""".split()
SIGNALS = ("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN")
SIGNAL = [name for name in dir(signal) if name.startswith("SIG") and name not in SIGNALS]
SIGNAL += "alarm itimer_real pause pthread_kill pthread_sigmask setitimer sigpending sigtimedwait sigwait".split()
SIGNAL += ["siginterrupt", "sigwaitinfo"]


class StandIn(types.ModuleType):
    """A module without some of its names, and with others."""

    def __init__(self, module, missing=(), **own):
        super().__init__(module.__name__)
        self.__dict__.update(_module=module, _missing={*missing}, **own)

    def __getattr__(self, name):
        if name in self._missing:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on Windows")
        return getattr(self._module, name)

    def __setattr__(self, name, value):
        setattr(self._module, name, value)


def refuse_open_files(change):
    """Return a function of the file system that refuses, as Windows does, to touch files that are open or mapped."""

    def refuse_if_open(*paths, **options):
        if options.get("dir_fd") is None and options.get("src_dir_fd") is None:
            links = map("/proc/self/fd/{}".format, os.listdir("/proc/self/fd"))
            held = [os.readlink(link) for link in links if os.path.lexists(link)]
            with open("/proc/self/maps", encoding="utf-8") as file:
                held += [line.split(maxsplit=5)[-1].strip() for line in file if "/" in line]
            for path in map(os.path.realpath, paths):
                if any(name == path or name.startswith(f"{path}/") for name in held):
                    raise PermissionError(errno.EACCES, f"{change.__name__}: open on Windows", path)
        return change(*paths, **options)

    return refuse_if_open


def fsync(number, flush=os.fsync):
    if fcntl(number, F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "a read-only handle cannot be flushed on Windows")
    flush(number)


def rename(source, target):
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "rename replaces nothing on Windows", target)
    os.replace(source, target)


def open_file(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "a folder cannot be opened on Windows", path)
    return os.open(path, *arguments, **options)


def kill(process, number):
    raise AssertionError(f"os.kill({process}, {number}) ends a process at once on Windows")


def symlink(source, target, target_is_directory=False):
    raise OSError(errno.EPERM, "links take a privilege on Windows", target)


def lock_bytes(number, mode, size):
    try:
        flock(number, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "locked") from None


def absent(path, *arguments, call, **options):
    if str(path).startswith(("/proc", "/sys")):
        raise FileNotFoundError(errno.ENOENT, "not on Windows", str(path))
    return call(path, *arguments, **options)


class Process(psutil.Process):
    """A process that tells its memory as on Windows."""

    def memory_info(self):
        return types.SimpleNamespace(peak_wset=super().memory_info().rss)


def install():
    """Show the stand-ins to modules of dinoseg; change for all what the file system does with open files."""
    for name in ("unlink", "remove", "rename", "replace", "rmdir"):
        setattr(os, name, refuse_open_files(getattr(os, name)))
    os.fsync = fsync
    for name in ("stat", "open"):
        call = getattr(pathlib.Path, name)
        setattr(pathlib.Path, name, lambda self, *a, call=call, **o: absent(self, *a, call=call, **o))
    multiprocessing.context._default_context._default_context = multiprocessing.get_context("spawn")
    import faulthandler

    stand_ins = {
        os: StandIn(os, OS, name="nt", rename=rename, open=open_file, kill=kill, symlink=symlink),
        signal: StandIn(signal, SIGNAL),
        sys: StandIn(sys, platform="win32"),
        faulthandler: StandIn(faulthandler, ["register"]),
        psutil: StandIn(psutil, Process=Process),
    }
    msvcrt = StandIn(types.ModuleType("msvcrt"), LK_NBLCK=2, locking=lock_bytes)
    real = builtins.__import__

    def windows_import(name, globals=None, locals=None, fromlist=(), level=0):
        if str((globals or {}).get("__name__")).startswith("dinoseg"):
            if name.partition(".")[0] in MODULES:
                raise ModuleNotFoundError(f"No module named {name!r} on Windows", name=name)
            if name == "msvcrt":
                return msvcrt
        module = real(name, globals, locals, fromlist, level)
        if str((globals or {}).get("__name__")).startswith("dinoseg"):
            return stand_ins.get(module, module)
        return module

    builtins.__import__ = windows_import


def import_all():
    """Import every module of dinoseg, and return how many there are."""
    import dinoseg

    names = [found.name for found in pkgutil.walk_packages(dinoseg.__path__, "dinoseg.")]
    for name in names:
        if name not in ("dinoseg.losses.fused_kernel",):  # which imports triton, for CUDA
            importlib.import_module(name)
    return len(names)


def main(folder):
    from command_line import SMALL, call, write_data

    write_data(pathlib.Path(folder) / "data")
    print(import_all())
    words = (*SMALL, "mode.metrics_only=true")
    train = ("mode=train", *words, "trainer.save_every=1", "trainer.val_every=2", "hydra.run.dir=run")
    here = "engine.workers=0"  # what the training has shown of spawned loaders is seconds of processor time each
    commands = {
        "train": (*train, "engine.workers=1", "data.cache=packed"),
        "resume": ("mode=train", "resume=run", "trainer.steps=4", here),
        "eval": ("mode=eval", "resume=run", here),
        "predict": ("mode=predict", "resume=run", "input=data/val/images", here),
    }
    for name, command in commands.items():
        done = call(folder, *command)
        print(f"{name}: {done.status}")
        if done.status:
            print(done.out, done.err, sep="\n", file=sys.stderr)


install()
if __name__ == "__main__":
    main(sys.argv[1])

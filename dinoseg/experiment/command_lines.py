"""Commands that started and resumed a run, as its folder stores them."""

from pathlib import Path

WORDS_FILE = "overrides.txt"  # in the config folders of a run: the words of a command, one per line
_LONGEST = 2**18  # maximum bytes of a command: twice Linux's limit of one word; the folder may be untrusted


def command_line(folder: Path) -> list[str]:
    """Return the words of the command that started a run; empty if none is stored or its file is too large."""
    return _read_words(folder / "config" / WORDS_FILE)


def command_lines(folder: Path) -> list[list[str]]:
    """Return the words of the command that started a run, and of those that resumed it, oldest first."""
    files = sorted(folder.glob(f"config*/{WORDS_FILE}"), key=lambda path: path.stat().st_mtime_ns)
    return [_read_words(path) for path in files]


def last_command_line(folder: Path) -> list[str]:
    """Return the words of the newest command in a folder: the one that started or last resumed the run."""
    return next(reversed(command_lines(folder)), [])


def find_typed_keys(folder: Path) -> set[str]:
    """Return the keys and groups that the newest command in a folder sets."""
    return {word.partition("=")[0].lstrip("+") for word in last_command_line(folder)}


def _read_words(path: Path) -> list[str]:
    if not path.is_file() or path.stat().st_size > _LONGEST:
        return []
    # not splitlines: a word may hold other line separators
    lines = path.read_bytes().decode(errors="replace").split("\n")
    return [word for word in lines if word]

"""What the runs and sides of a comparison are called: by their folders, and jobs of a sweep by what it varies."""

from collections.abc import Sequence
from pathlib import Path

from dinoseg.experiment.folder import command_line
from dinoseg.utils.wording import count_of

SWEEP = "multirun.yaml"  # in the folder of a sweep
_SEED = "seed"
_LONGEST = 60  # letters: a longer one is no heading


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return short names of run folders that tell them apart."""
    names = _by_folders(folders)
    return _by_words(folders, [[place] for place in range(len(folders))], (), names) or names


def side_names(folders: Sequence[Path], sides: Sequence[Sequence[int]]) -> list[str]:
    """Return a name for each side.

    Args:
        folders: of all runs.
        sides: places of each side's runs.
    """
    names = _by_folders(folders)
    joined = [_joined([names[place] for place in side]) for side in sides]
    if len(set(joined)) < len(joined):  # a folder may be called 0+1
        joined = [names[side[0]] for side in sides]
    return _by_words(folders, sides, (_SEED,), joined) or _by_words(folders, sides, (), joined) or joined


def _by_words(
    folders: Sequence[Path], sides: Sequence[Sequence[int]], without: Sequence[str], others: Sequence[str]
) -> list[str]:
    """Return what the commands of jobs of sweeps differ in, of each side; nothing where that does not name them.

    Args:
        folders: of all runs.
        sides: places of each side's runs.
        without: keys that name nothing.
        others: what sides of no sweep are called.
    """
    commands = [_command(folder) for folder in folders]
    swept = [command for command in commands if command]
    keys = dict.fromkeys(key for command in swept for key in command if not key.startswith("hydra"))
    differing = [key for key in keys if key not in without and len({command.get(key) for command in swept}) > 1]
    words = [" ".join(command[key] for key in differing if key in command) for command in commands]
    of_sides = [
        {words[place] if commands[place] else other for place in side}
        for side, other in zip(sides, others, strict=True)
    ]
    names = [name for side in of_sides for name in side]
    short = all(0 < len(word) <= _LONGEST for word, command in zip(words, commands, strict=True) if command)
    return names if short and len(set(names)) == len(sides) == len(names) else []


def _command(folder: Path) -> dict[str, str]:
    """Return the words of a sweep's job, without the + of what they add, by their keys; none of another run."""
    folder = folder.resolve()
    if not (folder.parent / SWEEP).is_file():
        return {}
    try:
        words = command_line(folder)
    except OSError:  # who may not read it has the folder's name
        return {}
    return {word.lstrip("+~").partition("=")[0]: word.lstrip("+") for word in words}


def _by_folders(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of the folders' paths, as many as it takes."""
    whole = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            break
    return names


def _joined(names: Sequence[str]) -> str:
    """Return one name of several: a/0 and a/1 as a/0+1."""
    head, slash, first = names[0].rpartition("/")
    if all(name.rpartition("/")[0] == head for name in names):
        names = [f"{head}{slash}{first}", *(name.rpartition("/")[2] for name in names[1:])]
    return "+".join(names) if len(names) <= 4 else f"{names[0]}+... ({count_of(names, 'run')})"

"""Names of sides and runs: the options in which jobs of sweeps differ, else their folders."""

from collections.abc import Sequence
from pathlib import Path

from dinoseg.config.composition import SHIPPED
from dinoseg.runs.folder import command_line
from dinoseg.utils.files import is_sweep_folder
from dinoseg.utils.wording import count_of

_LONGEST = 60  # characters: a longer name does not fit a heading


def side_names(folders: Sequence[Path], sides: Sequence[Sequence[int]]) -> list[str]:
    """Return a unique name for each side: what its runs share and what varies in their sweep, else its folders.

    An option of a config group is named alone, `linear`; other keys with their value, `head.lr=0.01`.

    Args:
        folders: folders of all runs.
        sides: indices of each side's runs.
    """
    by_folder = _by_folders(folders)
    swept = swept_words(folders)
    for with_groups in (False, True):
        names = []
        for side in sides:
            of_side = [swept[index] for index in side]
            words = " ".join(
                word if with_groups else _name_option(key, word)
                for key, word in of_side[0].items()
                if key != "resume" and all(each.get(key) == word for each in of_side)
            )
            names.append(words if 0 < len(words) <= _LONGEST else _join_run_names([by_folder[index] for index in side]))
        if len(set(names)) == len(names):
            return names
    return [by_folder[side[0]] for side in sides]


def _name_option(key: str, word: str) -> str:
    """Return the option of an override of a config group; other overrides unchanged."""
    option = word.partition("=")[2]
    return option if option and (SHIPPED / key.partition("@")[0]).is_dir() else word


def swept_words(folders: Sequence[Path]) -> list[dict[str, str]]:
    """Return the overrides of each run by key that vary between the given jobs of sweeps; empty for other runs."""
    commands = [_command(folder) for folder in folders]
    swept = [command for command in commands if command]
    keys = dict.fromkeys(key for command in swept for key in command if not key.startswith("hydra"))
    varied = [key for key in keys if len({command.get(key) for command in swept}) > 1]
    return [{key: command[key] for key in varied if key in command} for command in commands]


def _command(folder: Path) -> dict[str, str]:
    """Return the overrides of a sweep's job by key, without a leading +; empty for other runs.

    `resume=auto` is left out: it is no setting of the model.
    """
    folder = folder.resolve()
    if not is_sweep_folder(folder.parent):
        return {}
    try:
        words = command_line(folder)
    except OSError:  # unreadable: fall back to the folder's name
        return {}
    return {word.lstrip("+~").partition("=")[0]: word.lstrip("+") for word in words if word != "resume=auto"}


def _by_folders(folders: Sequence[Path]) -> list[str]:
    """Return the shortest path suffixes of the folders that are unique."""
    whole = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            break
    return names


def _join_run_names(names: Sequence[str]) -> str:
    """Join several names into one: a/0 and a/1 become a/0+1."""
    head, slash, first = names[0].rpartition("/")
    if all(name.rpartition("/")[0] == head for name in names):
        names = [f"{head}{slash}{first}", *(name.rpartition("/")[2] for name in names[1:])]
    return "+".join(names) if len(names) <= 4 else f"{names[0]}+... ({count_of(names, 'run')})"

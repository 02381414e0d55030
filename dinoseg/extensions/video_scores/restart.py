"""Resuming an interrupted evaluation of videos: masks of finished videos are copied from its run folder."""

import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoseg.evaluation.run_facts import TRACKING
from dinoseg.experiment.settings import check_same_settings
from dinoseg.utils import forms
from dinoseg.utils.atomic import atomic_folder
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries
from dinoseg.utils.wording import count_of, join_names

logger = logging.getLogger(__name__)
_FORM = forms.record(data=forms.table(forms.plain), given=forms.text, tracker=forms.table(forms.plain))


def earlier_run(restart: str | None, record: Mapping[str, Any]) -> Path | None:
    """Return the run folder `mode.restart`; None if it is not set.

    Raises:
        UserError: the folder is not an evaluation of videos, or its masks depend on other settings.
    """
    if restart is None:
        return None
    folder = Path(restart).expanduser()
    try:
        before = forms.read_json(folder / TRACKING, _FORM)
    except (OSError, forms.SchemaError) as error:
        raise UserError(
            f"mode.restart={restart} holds no readable {TRACKING} ({error}): it is not a run folder of mode=eval on "
            "videos, or it is damaged. Give the run folder of the evaluation to resume, or leave mode.restart out."
        ) from None
    check_same_settings(folder, _settings_of(before), _settings_of(record))
    return folder


def log_copied(restart: str | None, videos: Sequence[str]) -> None:
    """Log which videos' masks were copied from the run folder `mode.restart`, if it is set."""
    if restart is not None:
        names = f": {join_names(sorted(videos))}" if videos else ""
        logger.info("mode.restart=%s: %s reused%s", restart, count_of(videos, "video"), names)


def take_over(earlier: Path | None, out_dir: Path, files: Mapping[Path, Collection[str]]) -> bool:
    """Copy a video's masks from an earlier run if they are complete; return whether they were copied.

    Args:
        earlier: run folder of the earlier run; None without one.
        out_dir: run folder of this run.
        files: expected file names in each folder below `out_dir`.
    """
    if earlier is None:
        return False
    sources = {folder: earlier / folder.relative_to(out_dir) for folder in files}
    for folder, source in sources.items():
        if not source.is_dir() or {path.name for path in entries(source) if path.is_file()} != set(files[folder]):
            return False
    for folder, source in sources.items():
        with atomic_folder(folder) as part:
            shutil.copytree(source, part, dirs_exist_ok=True)
    return True


def _settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with the tracker's settings merged into its top level."""
    return {key: value for key, value in record.items() if key != "tracker"} | record["tracker"]

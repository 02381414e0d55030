"""Record of completed inputs in a prediction's run folder, from which a stopped run resumes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinoseg.core.channels import ChannelFiles
from dinoseg.core.sources import first_file
from dinoseg.utils import forms
from dinoseg.utils.atomic import write_json
from dinoseg.utils.files import stamp
from dinoseg.utils.units import read_valid_note

NOTE_FOLDER = "predicted"  # in the run folder: NAME.json for each input with complete results
_STAMP = forms.list_of(forms.whole(), 4)
_FORM = forms.record(input=forms.text, stamp=_STAMP)


class DoneInputs:
    """Inputs whose results in a run folder are complete, identified by the stamps of their files."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / NOTE_FOLDER
        self._found: dict[str, dict[str, Any]] = {}  # inputs with their stamps from before they were read

    def holds(self, name: str, source: Path | ChannelFiles, results: Sequence[Path]) -> bool:
        """Return whether an input is done: its record matches the file's stamp, and all its results exist.

        Call this before reading the file. The stamp taken here is what `note` records, so a file replaced in the
        meantime is not mistaken for the source of the results.
        """
        unfit = f"{source} is predicted again: the file has changed, or its results are missing."
        made_from = self._found[name] = self._made_from(source)
        return (
            read_valid_note(
                self._folder / f"{name}.json",
                lambda note: forms.read_json(note, _FORM),
                lambda noted: noted == made_from and all(result.exists() for result in results),
                damaged="%s cannot be read (%s): its input is predicted again.",
                unfit=unfit,
            )
            is not None
        )

    def note(self, name: str) -> None:
        """Record that all results of an input are written; `holds` must have been called for it before."""
        write_json(self._folder / f"{name}.json", self._found[name])

    def _made_from(self, source: Path | ChannelFiles) -> dict[str, Any]:
        absolute = str(first_file(source).absolute()).encode(errors="backslashreplace").decode()
        return {"input": absolute, "stamp": list(stamp(source) or ())}

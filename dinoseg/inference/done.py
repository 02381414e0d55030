"""Which inputs of a prediction are done: a note each in the run folder, by which a stopped run goes on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinoseg.utils import forms
from dinoseg.utils.atomic import write_json
from dinoseg.utils.stamps import stamp
from dinoseg.utils.units import finished

FOLDER = "predicted"  # in a run folder: NAME.json for each input whose results are whole
_STAMP = forms.listing(forms.whole(), 4)
_FORM = forms.record(input=forms.text, stamp=_STAMP)


class DoneInputs:
    """The inputs whose results in a run folder are whole, known by their files' stamps."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / FOLDER
        self._found: dict[str, dict[str, Any]] = {}  # the inputs as they were before they were read

    def holds(self, name: str, path: Path, results: Sequence[Path]) -> bool:
        """Return whether an input is done: its note is of this very file, and its results are there.

        This comes before the file is read: what replaces it later is not what its results are noted to be made from.
        """
        unfit = f"{path} is predicted anew: it is another file than before, or its results are gone."
        made_from = self._found[name] = self._made_from(path)
        return (
            finished(
                self._folder / f"{name}.json",
                lambda note: forms.read_json(note, _FORM),
                lambda noted: noted == made_from and all(result.exists() for result in results),
                damaged="%s cannot be read (%s): its input is predicted anew.",
                unfit=unfit,
            )
            is not None
        )

    def note(self, name: str) -> None:
        """Note that all results of an input are written, of which `holds` was asked."""
        write_json(self._folder / f"{name}.json", self._found[name])

    def _made_from(self, path: Path) -> dict[str, Any]:
        absolute = str(path.absolute()).encode(errors="backslashreplace").decode()
        return {"input": absolute, "stamp": list(stamp(path) or ())}

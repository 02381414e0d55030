"""File layout of IDD: its parts, file names and label encodings; imports no torch."""

import shlex
from collections.abc import Collection
from pathlib import Path

from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries
from dinoseg.utils.wording import join_names

IMAGES, LABELS = "leftImg8bit", "gtFine"
IMAGE, POLYGONS = "_leftImg8bit", "_gtFine_polygons"  # ends of the stems, after `{drive}/{id}`
HOME_MADE = "home_made"
ENCODINGS = {  # the official converter's names, to columns of the label table
    "id": "id",
    "csId": "cs_id",
    "csTrainId": "cs_train_id",
    "level4Id": "level4",
    "level3Id": "level3",
    "level2Id": "level2",
    "level1Id": "level1",
}
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".7z")
_DATA = {"level3Id": "idd", "level2Id": "idd_level2", "level1Id": "idd_level1", "csTrainId": "idd_cityscapes"}
_DATA |= {"id": "idd_ids"}


def label_suffix(encoding: str) -> str:
    """Return the end of a label map's stem, such as `_gtFine_labellevel3Ids`."""
    return "_gtFine_labelIds" if encoding == HOME_MADE else f"_gtFine_label{encoding}s"


def prepare_command(root: Path, encoding: str) -> str:
    """Return the command that makes the label maps of an encoding from the polygons."""
    data = _DATA.get(encoding, f"idd data.reader.encoding={encoding}")
    return f"python -m dinoseg mode=prepare data={data} {shlex.quote(f'data.root={root}')}"


def find_parts(root: Path) -> dict[str, Path]:
    """Return name to folder of the parts (part I, part II) below a root; a root that is a part has the name "".

    A part is a folder that holds `leftImg8bit` or `gtFine`.

    Raises:
        UserError: there is none.
    """
    if _is_part(root):
        return {"": root}
    inside = entries(root)
    parts = {path.name: path for path in inside if _is_part(path)}
    if not parts:
        archives = [path.name for path in inside if path.is_file() and path.suffix.lower() in _ARCHIVES]
        remedy = (
            f'Unpack {join_names(archives)} there first; for a tar file use `python -c "import tarfile; '
            "tarfile.open('FILE').extractall('FOLDER', filter='data')\"`."
            if archives
            else f"It holds {join_names([path.name for path in inside]) or 'nothing'}. Give the folder of a part, such "
            "as IDD_Segmentation or idd20kII, or the folder that holds the parts."
        )
        raise UserError(
            f"data.root={root} does not hold IDD: no {IMAGES} or {LABELS} in it or in a folder below. {remedy}"
        )
    return parts


def files_of(folder: Path, suffix: str, endings: Collection[str]) -> dict[str, Path]:
    """Return `{drive}/{id}` to file, in order, for all files below a split's folder whose stem ends with `suffix`.

    Raises:
        UserError: two files have one name.
    """
    files: dict[str, Path] = {}
    for path in (path for drive in entries(folder) for path in entries(drive)):
        if path.suffix.lower() not in endings or not path.stem.endswith(suffix):
            continue
        name = f"{path.parent.name}/{path.stem.removesuffix(suffix)}"
        if name in files:
            raise UserError(f"{files[name]} and {path} have the same name ({name}): keep one of them.")
        files[name] = path
    return files


def _is_part(folder: Path) -> bool:
    return (folder / IMAGES).is_dir() or (folder / LABELS).is_dir()

"""Extraction of untrusted ZIP archives: nothing outside the folder, no partial files."""

import errno
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from dinoseg.utils.atomic import whole_file
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_regular

_MAX_RATIO = 100  # video and PNG hardly compress: a file that grows a hundredfold is no recording
_RATIO_MATTERS = 100 * 2**20  # bytes below which a high ratio is harmless


def unpack(archive: Path, folder: Path, *, landmark: str) -> int:
    """Extract into a folder and return the number of files; files that are already complete are skipped.

    Files below the archive's folder that holds `landmark` go directly into `folder`, so it does not matter whether the
    archive has a top-level folder.

    Raises:
        UserError: the archive is damaged or encrypted; it contains a link, a file twice or a path outside the folder;
            or it exceeds the free disk space or a plausible size.
        OSError: writing failed; finished files remain.
    """
    check_regular(archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            members = _checked_members(archive, opened, landmark)
            missing = {path: info for path, info in members.items() if not _is_whole(folder / path, info)}
            _check_space(archive, missing, folder)
            for path, info in missing.items():
                _write_member(opened, info, folder / path)
    except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError, struct.error) as error:
        raise UserError(f"{archive} is damaged ({error}): download it again.") from None
    except OSError as error:
        if error.errno != errno.EINVAL or error.filename is not None:
            raise
        raise UserError(f"{archive} is damaged (it points outside itself): download it again.") from None
    except (RuntimeError, NotImplementedError) as error:  # raised by zipfile for passwords and unsupported methods
        raise UserError(f"{archive} cannot be unpacked ({error}): unpack it by hand into {folder}.") from None
    return len(members)


def _checked_members(archive: Path, opened: zipfile.ZipFile, landmark: str) -> dict[PurePosixPath, zipfile.ZipInfo]:
    members: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for info in opened.infolist():
        path = PurePosixPath(info.filename)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename:
            raise UserError(f"{archive} names a path outside its folder ({info.filename}): do not trust it.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise NotImplementedError(f"{info.filename} uses compression method {info.compress_type}")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"{archive} holds a link ({info.filename}), which is refused: do not trust it.")
        # added by desktop systems
        if info.is_dir() or path.parts[0] == "__MACOSX" or path.name.startswith("."):
            continue
        if path in members:
            raise UserError(f"{archive} holds {info.filename} twice: download it again.")
        members[path] = info
    top = next((path.parent for path in members if path.name == landmark), PurePosixPath("."))
    if all(path.is_relative_to(top) for path in members):
        members = {path.relative_to(top): info for path, info in members.items()}
    return members


def _check_space(archive: Path, members: Mapping[PurePosixPath, zipfile.ZipInfo], folder: Path) -> None:
    size = sum(info.file_size for info in members.values())
    packed = max(1, sum(info.compress_size for info in members.values()))
    if size > _RATIO_MATTERS and size / packed > _MAX_RATIO:
        raise UserError(
            f"{archive} would unpack to {size / packed:.0f} times its size, far more than a recording: do not trust it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{archive} unpacks to {size / 2**20:.0f} MiB, {folder} has {free / 2**20:.0f} MiB free. Free some space "
            "and run again."
        )


def _is_whole(path: Path, info: zipfile.ZipInfo) -> bool:
    if not path.is_file() or path.stat().st_size != info.file_size:
        return False
    checksum = 0
    with path.open("rb") as opened:
        while block := opened.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum == info.CRC


def _write_member(opened: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    with whole_file(path) as part, opened.open(info) as source, part.open("wb") as target:
        shutil.copyfileobj(source, target, 2**20)

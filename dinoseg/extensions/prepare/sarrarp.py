"""Preparation of SAR-RARP50: unpacking of archives, extraction of the needed frames, and checks of their counts."""

import errno
import functools
import json
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dinoseg.extensions.prepare.jobs import incomplete_error, run_jobs
from dinoseg.extensions.video.decoder import Decoder
from dinoseg.extensions.video.sarrarp_files import (
    FRAME_FOLDERS,
    FRAMES_PER_SECOND,
    MASK_FOLDER,
    MASK_STEP,
    PREPARED,
    PREPARED_FORM,
    TEST_FOLDERS,
    TRAIN_FOLDERS,
    VIDEO,
    frame_files,
    png_files,
)
from dinoseg.report.progress import Bar
from dinoseg.utils import forms
from dinoseg.utils.atomic import atomic_file, write_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_regular, entries
from dinoseg.utils.images import write_png
from dinoseg.utils.locks import hold_lock
from dinoseg.utils.ranges import Count, check_annotations
from dinoseg.utils.units import read_valid_note
from dinoseg.utils.wording import count_of, join_names

SPLIT_FOLDERS = TRAIN_FOLDERS + TEST_FOLDERS
_LOCK = ".prepare.lock"  # in the root: one run at a time
_MAX_RATIO = 100  # video and PNG hardly compress: a file that grows a hundredfold is no recording
_RATIO_MATTERS = 100 * 2**20  # bytes below which a high ratio is harmless


@dataclass(frozen=True)
class VideoJob:
    """One video: its folder, and its archive, if any."""

    folder: Path
    archive: Path | None

    @property
    def name(self) -> str:
        """Return the split folder and the video's folder."""
        return f"{self.folder.parent.name}/{self.folder.name}"


@check_annotations
def prepare(
    root: str | Path,
    *,
    rate: Count = 1,
    workers: Count = 2,
    videos: Sequence[str] | None = None,
    keep_archives: bool = True,
) -> dict[str, dict[str, int]]:
    """Unpack and extract, resuming where an earlier run stopped; return the counts of each video.

    Args:
        root: folder with `train1`, `train2`, `train` or `test`, which hold `video_*.zip` or `video_*/`.
        rate: frames per second of video: 1 (those with a mask) or 10 (the official toolkit's).
        workers: videos to process at once, one process each.
        videos: only these, such as `video_01` or `test/video_41`; None for all.
        keep_archives: do not remove an archive once its video is verified.

    Raises:
        UserError: there is nothing to prepare, the disk is full, or some videos failed; the last only after all others
            are finished.
    """
    root = Path(root).expanduser()
    if rate not in (1, 10):
        raise UserError(f"rate={rate}: choose 1 (frames that have a mask) or 10 frames per second.")
    jobs = _select_jobs(find_jobs(root), videos)
    work = functools.partial(prepare_video, rate=rate, keep_archive=keep_archives)
    try:
        with hold_lock(root / _LOCK):
            return _prepare_all(root, jobs, work, workers)
    except OSError as error:
        raise UserError(f"Cannot write to root={root}: {error}. Check its permissions.") from None


def _prepare_all(
    root: Path, jobs: Sequence[VideoJob], work: Callable[[VideoJob], dict[str, int]], workers: int
) -> dict[str, dict[str, int]]:
    with Bar(total=len(jobs), desc="preparing", unit="video") as bar:
        counts, failures = run_jobs(
            work,
            jobs,
            bar,
            workers=workers,
            root=root,
            ready="videos are ready",
            make_room="keep_archives=false removes each archive once its video is ready",
            name_job=lambda job: job.name,
        )
    if failures:
        lines = [
            f"{name}: {reason}" for name, reason in sorted((job.name, str(error)) for job, error in failures.items())
        ]
        raise incomplete_error(
            lines, f"{len(failures)} of {len(jobs)} videos could not be prepared, the others are ready"
        )
    return {job.name: counts[job] for job in sorted(counts, key=lambda job: job.name)}


def find_jobs(root: Path) -> list[VideoJob]:
    """Return the videos below the split folders, packed or not.

    Raises:
        UserError: there are none, or an archive is not named after a video.
    """
    jobs: dict[Path, VideoJob] = {}
    folders = [root / name for name in SPLIT_FOLDERS if (root / name).is_dir()]
    for folder in folders:
        for video in (path for path in entries(folder) if path.name.startswith("video_") and path.is_dir()):
            jobs[video] = VideoJob(video, None)
        for archive in (path for path in entries(folder) if path.suffix == ".zip"):
            if not re.fullmatch(r"video_\w+", archive.stem):
                raise UserError(f"{archive} is not named after a video: rename it to video_<number>.zip.")
            video = folder / archive.stem
            jobs[video] = VideoJob(video, archive)
    if not jobs:
        raise UserError(
            f"Nothing to prepare under root={root}: no video_*.zip and no video_* folder in "
            f"{', '.join(SPLIT_FOLDERS)}. Download SAR-RARP50 into these folders first."
        )
    return [jobs[video] for video in sorted(jobs)]


def prepare_video(job: VideoJob, *, rate: int, keep_archive: bool) -> dict[str, int]:
    """Unpack and extract one video, unless that is done; return its counts.

    Raises:
        UserError: the archive or the video is damaged, or frames and masks do not belong together.
        OSError: writing failed; finished files remain.
    """
    counts = _done_before(job, rate)
    if counts is None:
        # complete members are skipped, so that the unpacking of a killed run resumes
        if job.archive is not None:
            unpack(job.archive, job.folder, landmark=VIDEO)
        counts = _extract(job.folder, rate)
    # only after the frames are verified: the archive is their only source
    if job.archive is not None and not keep_archive:
        job.archive.unlink(missing_ok=True)
    return counts


def _done_before(job: VideoJob, rate: int) -> dict[str, int] | None:
    """Return the counts that an earlier run saved if they are still valid, else None."""

    def hold(counts: Mapping[str, int]) -> bool:
        frames, masks = (len(png_files(job.folder / name)) for name in (FRAME_FOLDERS[0], MASK_FOLDER))
        return counts["rate"] >= rate and counts["frames"] <= frames and counts["masks"] == masks

    return read_valid_note(job.folder / PREPARED, lambda path: forms.read_json(path, PREPARED_FORM), hold)


def _extract(folder: Path, rate: int) -> dict[str, int]:
    masks = png_files(folder / MASK_FOLDER)
    if not masks:
        raise UserError(f"{folder} has no masks in {MASK_FOLDER}/. Unpack the video's archive again.")
    video = folder / VIDEO
    if (counts := _extracted_elsewhere(folder, masks, rate)) is not None:
        return counts
    if not video.is_file():
        names = sorted(path.name for path in folder.iterdir())
        raise UserError(f"{folder} has no {VIDEO}; it holds {join_names(names)}. Unpack the video's archive again.")
    target = folder / FRAME_FOLDERS[0]
    step = FRAMES_PER_SECOND // rate
    decoded = extract_frames(video, target, step=step)
    _verify(folder, decoded, step)
    # written last: this file marks the video as finished
    counts = {"rate": rate, "decoded": decoded, "frames": len(range(0, decoded, step)), "masks": len(masks)}
    write_text(folder / PREPARED, json.dumps(counts))
    return counts


def _extracted_elsewhere(folder: Path, masks: Mapping[str, Path], rate: int) -> dict[str, int] | None:
    """Return the counts of sufficient frames that another tool wrote; None if frames must be extracted."""
    frames = frame_files(folder)
    there = 10 if f"{FRAMES_PER_SECOND // 10:09d}" in frames else 1
    has_video, ours = (folder / VIDEO).is_file(), (folder / FRAME_FOLDERS[0]).is_dir()
    if not frames or (has_video and (ours or there < rate)):
        return None
    if lone := sorted(masks.keys() - frames.keys()):
        raise UserError(
            f"{folder} has {count_of(lone, 'mask')} without frame: {join_names(lone)}. Remove its frames and put "
            f"{VIDEO} there to extract them."
        )
    if there < rate:
        raise UserError(f"{folder} has {there} frame per second; {rate} need {VIDEO} there.")
    return {"rate": there, "frames": len(frames), "masks": len(masks)}


def _verify(folder: Path, decoded: int, step: int) -> None:
    due = {f"{index:09d}" for index in range(0, decoded, MASK_STEP)}  # floor((N - 1) / 60) + 1 of them
    masks = png_files(folder / MASK_FOLDER).keys()
    if masks != due:
        raise UserError(
            f"{folder / VIDEO} has {decoded} frames, so it needs {len(due)} masks; {MASK_FOLDER}/ has {len(masks)} "
            f"(missing: {join_names(sorted(due - masks)) or 'none'}; without a frame: "
            f"{join_names(sorted(masks - due)) or 'none'}). Unpack the video's archive again."
        )
    frames = png_files(folder / FRAME_FOLDERS[0]).keys()
    if lacking := sorted({f"{index:09d}" for index in range(0, decoded, step)} - frames):
        raise UserError(f"{folder / FRAME_FOLDERS[0]} lacks the frames {join_names(lacking)}. Run again.")


def _select_jobs(jobs: list[VideoJob], videos: Sequence[str] | None) -> list[VideoJob]:
    if videos is None:
        return jobs
    known = {job.name for job in jobs} | {job.folder.name for job in jobs}
    if unknown := [name for name in videos if name not in known]:
        raise UserError(
            f"videos={list(videos)}: {', '.join(unknown)} does not exist. Choose from "
            f"{join_names([job.name for job in jobs], 60)}."
        )
    return [job for job in jobs if job.name in videos or job.folder.name in videos]


def extract_frames(video: Path, folder: Path, *, step: int) -> int:
    """Write frame i as `folder/%09d.png` for each multiple i of `step`; return the number of decoded frames.

    Existing files are reused, since files are written atomically.

    Raises:
        UserError: the video cannot be opened or decoded, or ends before the number of frames that its header promises.
        OSError: writing failed; finished files remain.
    """
    frames = 0
    with Decoder(video) as decoder:
        while decoder.advance():
            target = folder / f"{frames:09d}.png"
            if frames % step == 0 and not target.exists():
                write_png(target, decoder.rgb_image())
            frames += 1
        decoder.check_whole()
    return frames


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
            missing = {path: info for path, info in members.items() if not _is_complete(folder / path, info)}
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


def _is_complete(path: Path, info: zipfile.ZipInfo) -> bool:
    if not path.is_file() or path.stat().st_size != info.file_size:
        return False
    checksum = 0
    with path.open("rb") as opened:
        while block := opened.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum == info.CRC


def _write_member(opened: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    with atomic_file(path) as part, opened.open(info) as source, part.open("wb") as target:
        shutil.copyfileobj(source, target, 2**20)

"""Scores of tracks of videos, in the formats of MOTS and YouTube-VIS; no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.metric import Counts
from dinoseg.extensions.protocols.contract import Cases, Measured, RowProtocol, ScoringCase
from dinoseg.extensions.tracks.files import TrackCase, find_mots, find_youtube_vis
from dinoseg.extensions.tracks.hota import TrackScores
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Natural
from dinoseg.utils.wording import format_value


class TrackProtocol(RowProtocol):
    """HOTA as TrackEval computes it, and track AP as the API of YouTube-VIS does.

    Args:
        categories: name of each class id of text files of MOTS; None: the class ids of the reference.
        ignore_id: class id of ignored regions in a reference of MOTS; None: it has none.
    """

    name = "tracks"
    unit = "video"
    keys = tuple(TrackScores.scores)
    metric: TrackScores

    def __init__(self, categories: Mapping[int, str] | None = None, ignore_id: Natural | None = 10) -> None:
        if any(type(number) is not int for number in categories or ()):
            raise UserError(f"categories={format_value(categories)}: give a whole number as the id of each name.")
        if ignore_id in (categories or ()):
            raise UserError(
                f"ignore_id={ignore_id} is a class of categories, too. Leave the class out, or set ignore_id=null."
            )
        self._given = None if categories is None else {number: str(name) for number, name in categories.items()}
        self._ignore_id = ignore_id
        # set by `find`: name of each category by its id, and the metric of these
        self._categories: dict[int, str] = {}
        self.metric = TrackScores(0)
        self.rules: Mapping[str, Any] = {
            "absent_class": "a class without a mask on both sides enters no mean; AP: without an annotation",
            "resolution": "as annotated; masks of another size are an error",
            "ignore": "MOTS: predictions without a match of IoU 0.5 that lie to more than half in an ignored region do "
            "not count; YouTube-VIS: AP ignores matches with crowds, and HOTA counts crowds as objects",
            "aggregation": "HOTA and its parts: counts of all videos by class and alpha, mean over alphas of 0.05 to "
            "0.95, mean over classes; _pooled: counts of all classes; AP: tracks of a class by score, the first 100 of "
            "a video, mean over 101 recalls, IoUs of 0.5 to 0.95, classes",
            "version": "TrackEval 12c8791; youtubevos/cocoapi f3f9948, YTVOSeval with iouType=segm",
            "differs": [
                "a class without a mask on both sides is left out of means; TrackEval's default counts a HOTA of 0",
                "in MOTS, unknown classes are an error; TrackEval leaves them out",
                "an annotation with the id 0 can be matched; YTVOSeval counts its match as a miss",
            ],
        }

    def find(self, reference: Path, prediction: Path) -> Cases:
        """Return a case for each video of the reference.

        Raises:
            UserError: files are missing or not of their form.
        """
        if reference.suffix == ".json":
            self._categories, listing = find_youtube_vis(reference, prediction)
        else:
            self._categories, listing = find_mots(reference, prediction, self._given, self._ignore_id)
        self.metric = TrackScores(len(self._categories))
        return listing

    def measure(self, case: ScoringCase) -> Measured:
        """Return the counts and rows of a video.

        Raises:
            BadFile: a file is invalid.
        """
        assert isinstance(case, TrackCase)
        video = case.read(self._categories)
        counts = {
            f"{side}_tracks": len(np.unique(tracks.ids))
            for side, tracks in (("reference", video.reference), ("predicted", video.prediction))
        }
        return Measured(np.array([*counts.values()]), counts, self.metric.count_video(video))

    def per_class(self, rows: Sequence[Counts]) -> list[dict[str, Any]]:
        """Return the scores and numbers of masks of each class."""
        found = self.metric.score_classes(rows)
        return [
            {"id": number, "name": name, **{key: values[place] for key, values in found.items()}}
            for place, (number, name) in enumerate(self._categories.items())
        ]

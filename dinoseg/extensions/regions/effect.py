"""Effect of removing small regions on scores, with paired intervals, from the same forward passes."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from dinoseg.core.metric import plain_score
from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.data.splits import find_groups
from dinoseg.evaluation.collected import Collector
from dinoseg.evaluation.scoring.intervals import estimate_difference
from dinoseg.evaluation.unit_scores import leave_units_out
from dinoseg.extensions.regions.regions import Regions
from dinoseg.inference.strategy import InferenceStrategy
from dinoseg.metrics.miou import MeanIoU
from dinoseg.metrics.rows import MetricRows
from dinoseg.report.html.page import format_interval
from dinoseg.report.table import percent
from dinoseg.training.engine import Engine
from dinoseg.utils.atomic import write_json
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)
FILE = "regions.json"


def region_effect(strategy: InferenceStrategy, data: SegmentationData, engine: Engine) -> "RegionEffect | None":
    """Return what scores the removal of regions; None for a strategy that removes none."""
    return RegionEffect(strategy, data, engine) if isinstance(strategy, Regions) else None


class RegionEffect:
    """Collector of the counts of one rank's images without and with the removal of regions.

    Args:
        strategy: predicts the images.
        data: the evaluated data set.
        engine: ranks.
    """

    def __init__(self, strategy: Regions, data: SegmentationData, engine: Engine) -> None:
        self._strategy, self._data, self._engine = strategy, data, engine
        self._sides = [MetricRows([MeanIoU()], data, engine.rank, engine.world_size) for _ in range(2)]
        self._collector: Collector | None = None

    def watch(self, collector: Collector | None) -> "RegionEffect":
        """Return what receives each batch of an evaluation instead of its collector, which it passes them to."""
        self._collector = collector
        return self

    def add(self, batch: Batch, ids: Tensor, logits: Tensor) -> None:
        """Add a batch, in the form that `evaluate` passes to `on_batch`, right after its prediction."""
        for side, predicted in zip(self._sides, (self._strategy.original, ids), strict=True):
            side.add(batch, predicted, logits)
        if self._collector is not None:
            self._collector.add(batch, ids, logits)

    def report(self, out_dir: Path, split: str, group: str | None) -> dict[str, Any] | None:
        """Print the difference in mIoU, and write those of all scores with intervals to regions.json.

        Args:
            out_dir: folder of the file.
            split: name of the evaluated split.
            group: pattern of the units' names; None: each image is a unit.

        Returns:
            The content of the file; None on ranks other than the main one.
        """
        for side in self._sides:
            side.add_scores({"classes": [{} for _ in self._data.classes]}, self._engine.gather)
        if not self._engine.is_main:
            return None
        groups, _ = find_groups(group, list(self._data.names), "data.group")
        units = [groups.get(name, name) for name in self._data.names]
        before, after = (leave_units_out(side.metrics[0], side.counts[0], units) for side in self._sides)
        gaps = {name: estimate_difference([before[name]], [after[name]]) for name in before}
        scored = count_of(sum(before["miou"].scored), "group" if groups else "image")
        gap = gaps["miou"]
        low, high = gap.ci95 or (0.0, 0.0)
        verdict = "better" if low > 0 else "worse" if high < 0 else "no significant difference"
        print(
            f"regions:      removing them changes mIoU by {percent(gap.value, 2, '+')} points (95 % interval "
            f"{format_interval(gap.ci95, 2, '+')} over {scored}): {verdict}"
        )
        if split != "test":
            logger.warning(
                "If inference.min_region or inference.largest_component were chosen on the split %s, its scores do not "
                "show that they help. Confirm the choice on another split, such as mode.split=test.",
                split,
            )
        differences = {name: {"value": plain_score(gap.value), "ci95": gap.ci95} for name, gap in gaps.items()}
        result = {"split": split, "units": scored, "differences": differences}
        write_json(out_dir / FILE, result)
        return result

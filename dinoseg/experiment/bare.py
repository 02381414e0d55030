"""Models whose backbone has neither adapter nor checkpoint, to look at its features."""

from collections.abc import Sequence

from dinoseg.experiment.models import ModelBuilder
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel


def build_bare_model(builder: ModelBuilder, layers: Sequence[int], num_classes: int = 1) -> SegmentationModel:
    """Return a segmenter of some blocks of the config's backbone, without adapter, and a new linear head."""
    backbone = builder.with_changes({"backbone": {"layers": [*layers]}}).backbone()
    head = LinearHead(backbone.dim, backbone.num_layers, num_classes)
    sizes = {key: builder.value(f"resolution.{key}") for key in ("scale", "longest")}
    return SegmentationModel(backbone, head, **sizes)

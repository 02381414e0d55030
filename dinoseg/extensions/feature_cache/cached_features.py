"""Feature cache of a training on images, as the config node `features` sets it."""

from collections.abc import Mapping
from typing import Any

from dinoseg.experiment.builder import Builder
from dinoseg.extensions.feature_cache.choice import CacheOptions, feature_cache, has_frozen_part, stored_as
from dinoseg.models.model import SegmentationModel
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.utils.ranges import Positive


def cache_features(
    builder: Builder,
    data_module: ImageDataModule,
    model: SegmentationModel,
    engine: Engine,
    epochs: Positive,
    previous_choices: Mapping[str, str | None],
    *,
    dtype: Any = "auto",
    gib: Positive | None = None,
) -> dict[str, str]:
    """Let a data module cache the features of a model's frozen part, if `engine.cache` enables it.

    Args:
        builder: builds the parts of the experiment.
        data_module: its `cache` is set.
        model: that is trained, on the device.
        engine: device and ranks.
        epochs: of the whole training.
        previous_choices: choices of a resumed run.
        dtype: type in which features are cached, see `stored_as`.
        gib: see `CacheOptions`.

    Raises:
        UserError: features must be cached, but cannot be; or `dtype` is unknown.
    """
    if not has_frozen_part(model, engine):
        return {}
    options = CacheOptions(
        builder.cache_dir,
        epochs,
        drawing=builder.digest("data.augment"),
        parts={group: builder.digest(group, lr=None) for group in ("backbone", "adapter", "head")},
        dtype=stored_as(dtype, previous_choices),
        gib=gib,
        previous=previous_choices.get("engine.cache"),
    )
    cache = data_module.cache = feature_cache(data_module, model, engine, options)
    return {} if cache is None else {"engine.cache": cache.place, "features.dtype": options.dtype}

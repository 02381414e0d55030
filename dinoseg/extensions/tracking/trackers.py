"""Builder of trackers: config group `slots` names those of slot models, and `tracker` all others."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from dinoseg.checkpoints.trained import TrainedModel
from dinoseg.config.nodes import expect_type, instantiate, type_errors_as_user_errors
from dinoseg.experiment.models import ModelBuilder
from dinoseg.extensions.tracking.tracker import Tracker
from dinoseg.inference.trained_sizes import TrainedSizes, limit_to_trained_size
from dinoseg.training.engine import Engine
from dinoseg.utils.errors import UserError

_REMEDY = (
    "Set its `_target_` to a class that inherits from dinoseg.extensions.tracking.tracker.Tracker, "
    "and `_partial_: true`."
)


def tracker_maker(
    builder: ModelBuilder,
    engine: Engine,
    trained: TrainedModel | None = None,
    *,
    batch_size: int,
    options: Mapping[str, float | None] | None = None,
    sizes: TrainedSizes | None = None,
) -> Callable[[], Tracker]:
    """Return a function that creates trackers of a trained model, or of the backbone of a config.

    The settings are validated before the backbone's weights are read.

    Args:
        builder: of the whole config.
        engine: device and precision.
        trained: the trained model; None: the backbone alone tracks, without adapter.
        batch_size: frames per forward pass.
        options: values of keys of `mode`, such as smoothing, by argument of the tracker; None: the tracker's default.
        sizes: image sizes of a segmenter's training, to which larger frames are reduced; None: no reduction.

    Raises:
        UserError: the config node makes no tracker, or one that does not take an option.
    """
    follows_slots = trained is not None and trained.model.head.no_classes is not None
    group, node = ("slots", builder.value("slots")) if follows_slots else ("tracker", builder.value("tracker"))
    name = f"{group}={builder.options[group]}"
    make = tracker_factory(node, name)
    takes = signature(make).parameters
    arguments: dict[str, Any] = {"device": engine.device, "autocast": engine.autocast, "batch_size": batch_size}
    for key, value in (options or {}).items():
        if value is None:
            continue
        if key not in takes:
            raise UserError(f"mode.{key}={value}: {name} takes no `{key}`. Leave mode.{key} out.")
        arguments[key] = value
    if "sizes" in takes:
        arguments["sizes"] = sizes
    elif trained is not None:
        limit_to_trained_size(trained.model, sizes)
    model = builder.backbone().to(engine.device) if trained is None else trained.single_pass_model
    return lambda: expect_type(Tracker, make(model, **arguments), group)  # type: ignore[type-abstract]


def tracker_factory(node: Any, name: str, overrides: Mapping[str, Any] | None = None) -> Callable[..., Tracker]:
    """Return the factory that a node of `tracker` or `slots` describes; it takes a model, see `Tracker`.

    Args:
        node: the config node.
        name: group and option as typed, for messages.
        overrides: values for those of its keys that the node has.

    Raises:
        UserError: the node describes no factory.
    """
    with type_errors_as_user_errors(name, _REMEDY):
        make = instantiate(node, overrides={key: value for key, value in (overrides or {}).items() if key in node})
    if not callable(make):
        raise UserError(f"{name} returns {type(make).__name__}, which does not create trackers. {_REMEDY}")
    return make

"""`dinoseg.create_model`: a new model from options of the config groups."""

from collections.abc import Iterable, Mapping, Set
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from dinoseg.api.compose import compose_call
from dinoseg.api.dataset import TRAINING_KEYS
from dinoseg.api.objects import check_fit, split_modules
from dinoseg.config.plain import keys_of
from dinoseg.core.contracts import Backbone, Head, require_classes
from dinoseg.data.classes.labels import Labels
from dinoseg.experiment.initial import check_initial, load_initial_weights
from dinoseg.experiment.models import ModelBuilder
from dinoseg.experiment.objects import lend_objects
from dinoseg.segmenter.facts import ModelFacts
from dinoseg.segmenter.segmenter import Segmenter
from dinoseg.segmenter.torch_runtime import preserve_global_state
from dinoseg.utils.collection import collection_paused
from dinoseg.utils.errors import NoMode, UnknownKey, UserError
from dinoseg.utils.files import path_exists
from dinoseg.utils.ranges import Range, whole_number
from dinoseg.utils.wording import suggest_nearest

_ARGUMENTS = ("backbone", "head", "adapter", "num_classes", "classes", "weights", "init", "config_dir")
_READ = (  # groups and keys that change a model, its parameter groups or its file
    *("hparam", "local", "task", "backbone", "adapter", "head", "data", "resolution", "inference", "seed", "init"),
    "optim.optimizer",
)
_NOT_READ = (  # of these groups: what the caller's own loop does
    *("optim.optimizer.betas", "optim.optimizer.freeze_backbone_until"),
    *(f"data.{key}" for key in (*TRAINING_KEYS, "folds", "fold", "cache")),
)
_CLASSES = Range("2 to 255. For one kind of object, give two: the background and the object", 2, 255)


def create_model(
    backbone: str | Mapping[str, Any] | Backbone | None = None,
    *,
    head: str | Mapping[str, Any] | Head | None = None,
    adapter: str | Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    classes: Iterable[str] | None = None,
    weights: str | PathLike[str] | bool | None = "pretrained",
    init: str | PathLike[str] | None = None,
    config_dir: str | PathLike[str] | None = None,
    **overrides: Any,
) -> Segmenter:
    """Return a new segmentation model on the CPU, in train mode.

    Options are those of the command line, and so are all values that are not given: `list_backbones`, `list_heads` and
    `list_adapters` return them, docs/models.md describes them. The head's weights are random; they depend on `seed`
    alone, and the caller's random state does not change.

    Args:
        backbone: option of the group, such as `dinov3_vits16`; None: dinov2_vits14, or that of a recipe in `hparam`.
            Or an object of a class that inherits `dinoseg.core.contracts.Backbone`, which the model holds itself.
        head: option of the group; None: linear, or that of the recipe. Or an object of `dinoseg.core.contracts.Head`.
        adapter: option of the group; None: frozen, or that of the recipe. As for all groups, a dict with the option as
            `name` sets keys, too: `{"name": "lora", "rank": 4}`.
        num_classes: number of classes, 2 to 255, which get the names class_0, class_1 and so on.
        classes: their names in the order of their ids, instead of the number.
        weights: of the backbone: `pretrained` (those of the option, downloaded once), `random`, a hub id (`id@revision`
            for a revision), a folder or a file. True is `pretrained`; False and None are `random`.
        init: saved model, checkpoint or run folder, whose trained weights the new model starts from. It needs the same
            backbone, adapter and head, and may have other classes: the log names the tensors that are loaded and new.
        config_dir: folder with config groups of your own, as `--config-dir` on the command line.
        overrides: further keys and groups of the config: `seed=1`, `hparam="camvid"`, `optim={"optimizer": {"lr":
            1e-4}}`, or dotted ones as in `**{"head.layers": [-1]}`.

    Raises:
        UserError: an unknown option or key, an invalid value, no classes, parts that do not fit together, or weights
            that cannot be read.

    Examples:
        >>> import dinoseg
        >>> model = dinoseg.create_model("tiny", head="mlp", adapter="lora", num_classes=3)
        >>> model.classes
        ('class_0', 'class_1', 'class_2')
    """
    names = _names(num_classes, classes)
    overrides = overrides if init is None else {**overrides, "init": init}
    given: dict[str, Any] = {"backbone": backbone, "head": head, "adapter": adapter, "data.classes": names}
    weights = "random" if weights is None or weights is False else weights
    given["backbone.weights"] = None if weights is True or weights == "pretrained" else _whole_path(weights)
    values = {key: value for key, value in given.items() if value is not None} | overrides
    values, objects = split_modules(values, "backbone", "head")
    no_effect = _no_effect(overrides)
    with collection_paused():
        try:
            cfg = compose_call(values, config_dir)
        except NoMode as error:
            raise UserError(no_effect or str(error)) from None
        except UnknownKey as error:
            name = error.key.partition(".")[0]
            meant = suggest_nearest(name, _ARGUMENTS) if name in overrides else ""
            raise UserError(f"{name} is not an argument.{meant}" if meant else str(error)) from None
        if names is None and not {"data", "data.classes", "hparam"} & overrides.keys():
            raise UserError('The model has no classes. Give num_classes=2, or their names: classes=["ground", "leaf"].')
        if no_effect:
            raise UserError(no_effect)
        with preserve_global_state(), lend_objects(objects):
            builder = ModelBuilder(cfg)
            labels = _read_labels(builder, num_classes)
            model, strategy = builder.model().to("cpu"), builder.strategy(labels.classes)
            if init is not None:
                check_initial(builder, model)
                load_initial_weights(builder, model, list(labels.classes))
            require_classes(model.head, f"head={head}")
            if objects:
                check_fit(model, len(labels.classes))
        facts = ModelFacts(labels.classes, labels.palette, labels.ignore_index, pixels=builder.pixels.as_dict())
        return Segmenter(model, facts, builder.config, info={}, strategy=strategy).train()


def _no_effect(overrides: Mapping[str, Any]) -> str:
    """Return the message on keys that do not change the model; "" if all do."""
    idle = [key for key in keys_of(overrides) if not _is_used(key.lstrip("+~").replace("/", "."))]
    if not idle:
        return ""
    return (
        f"{max(idle, key=len)} has no effect on a model that trains in a loop of your own. Leave it out, or train by "
        f"dinoseg.train. create_model reads {', '.join(_READ)}."
    )


def _is_used(key: str) -> bool:
    is_read = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in _READ)
    return is_read and not any(f"{key}.".startswith(f"{name}.") for name in _NOT_READ)


def _whole_path(weights: str | PathLike[str]) -> str | PathLike[str]:
    """Return an existing file or folder as its whole path: the current folder may change before the model is saved."""
    is_path = weights not in ("", "random") and path_exists(fspath(weights))
    return Path(weights).expanduser().absolute() if is_path else weights


def _read_labels(builder: ModelBuilder, num_classes: int | None) -> Labels:
    """Return the classes; refuse a single one where each pixel has one class."""
    if not builder.task.has_layers:
        whole_number(len(builder.labels.classes), "len(classes)" if num_classes is None else "num_classes", _CLASSES)
    return builder.labels


def _names(num_classes: int | None, classes: Iterable[str] | None) -> list[str] | None:
    """Return the names of the classes; None if neither is given.

    Raises:
        UserError: the number differs from that of the names, or these are text, or without an order.
    """
    if isinstance(classes, str | Mapping | Set):
        raise UserError(f"classes={classes!r} is not a list. Give the names of the classes in the order of their ids.")
    if classes is None:
        return None if num_classes is None else [f"class_{number}" for number in range(num_classes)]
    names = [str(name) for name in classes]
    if num_classes not in (None, len(names)):
        raise UserError(f"num_classes={num_classes}, but classes has {len(names)} names. Give one of them.")
    return names

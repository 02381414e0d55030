"""Initial weights of a new run, loaded from another run (`init`) for all tensors that both models train."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoseg.experiment.models import ModelBuilder
from dinoseg.models.model import SegmentationModel, fingerprint, quantised_names, trained_names
from dinoseg.training import checkpoint
from dinoseg.training.loading import Checkpoint, casts
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, format_text, join_names

logger = logging.getLogger(__name__)
_NEEDED = "needed from "  # prefix of a recipe's name: value of `init` in recipes that build on a run of the user
_UPDATES = ".lora_"  # part of the names of LoRA's tensors
_BASE = ".base_layer."  # part of the names of the original tensors of a layer with LoRA


def load_initial_weights(
    builder: ModelBuilder,
    model: SegmentationModel,
    classes: list[str],
    share: Callable[[Any], Any] = lambda value: value,
) -> None:
    """Load the trained weights of the run that `init` names into a new model, where they fit, and log the result.

    Args:
        builder: of the whole config, for which `has_initial` is True.
        model: as built, on the CPU; `check_initial` has accepted it.
        classes: class names of the data.
        share: broadcasts a value from rank 0.

    Raises:
        UserError: backbone weights that the run trained would be left out, it was trained on other frozen ones, or
            ranks read different checkpoints of it.
    """
    init = builder.value("init")
    offered = _read_init_run(init, checkpoint.outline)
    _, left = _select_tensors(init, model, offered)
    # read only what the model has room for: an untrusted file may describe more than fits in memory
    room = {key for key, name, _ in _checkpoint_tensors(model, offered) if name not in left}
    saved = _read_init_run(init, partial(checkpoint.read, only=room))
    progress = saved.info["progress"]
    if share(progress) != progress:
        raise UserError(
            f"init={init}: that run wrote a new checkpoint while the ranks of this one were reading it. Wait until it "
            "ends, or give a copy of its checkpoint."
        )
    if Path(init).expanduser().is_dir():
        logger.info("init=%s: reading %s.", init, saved.path)
    taken, _ = _select_tensors(init, model, saved)
    _check_frozen(init, model, saved, builder.config)
    _check_scale(init, saved, builder.settings("adapter"))
    model.load_state_dict(taken, strict=False)
    _log_loaded(init, model, saved, taken, left, classes)


def has_initial(builder: ModelBuilder) -> bool:
    """Return whether a run is new and starts from the weights of another run.

    Raises:
        UserError: the recipe requires such a run, and none is named.
    """
    if builder.resume is not None:
        return False
    init = builder.value("init")
    if str(init).startswith(_NEEDED):
        recipe = str(init).removeprefix(_NEEDED)
        raise UserError(
            f"hparam={builder.options['hparam']} starts from the weights of a run with hparam={recipe}: train that one "
            "first. Then set init=RUN, its run folder; or init=null to start without."
        )
    return init is not None


def check_initial(builder: ModelBuilder, model: SegmentationModel) -> None:
    """Refuse a run that does not fit head or backbone, or a `head.init` as well; the model may be on the meta device.

    Raises:
        UserError: it does not exist, nothing of its head fits, backbone weights that it trained would be left out, or
            `head.init` is set, too.
    """
    init = builder.value("init")
    if model.head.init is not None:
        raise UserError(
            f"init={init} and head.init={model.head.init} both set the initial weights of the head. Leave one out."
        )
    offered = _read_init_run(init, checkpoint.outline)
    fitting, _ = _select_tensors(init, model, offered)
    _check_head(builder, model, offered, fitting)


def _read_init_run(init: str, read: Callable[..., Checkpoint]) -> Checkpoint:
    return read(checkpoint.find(str(init), "best", key="init"), key="init")  # the name of a folder may be a number


def _checkpoint_tensors(model: SegmentationModel, saved: Checkpoint) -> list[tuple[str, str, Tensor]]:
    """Return the key, the name in this model and the value of each tensor of a checkpoint, ignoring LoRA's renaming."""
    names = {_strip_lora(name): name for name in model.state_dict()}
    have = saved.part("model")
    return [(f"model/{name}", names.get(_strip_lora(name), name), value) for name, value in have.items()]


def _strip_lora(name: str) -> str:
    """Return the name that a tensor has without LoRA."""
    return name.replace(_BASE, ".")


def _select_tensors(init: str, model: SegmentationModel, saved: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a checkpoint that the model also trains, in the same shapes, and the names of the others.

    Frozen tensors that the model already has are in neither.
    """
    state = model.state_dict()
    trained = trained_names(model)
    have = {name: value for _, name, value in _checkpoint_tensors(model, saved)}
    alike = {name: value for name, value in have.items() if name in trained and value.shape == state[name].shape}
    taken = {name: value for name, value in alike.items() if casts(value.dtype, state[name].dtype)}
    # a file may also hold frozen tensors, which the model already has
    left = [name for name, value in have.items() if name not in taken and not _already_holds(value, state.get(name))]
    lost = [name for name in left if name.startswith("backbone.")]
    if lost:
        raise UserError(
            f"init={init}: it holds {count_of(len(lost), 'tensor')} of its backbone (such as {format_text(lost[0])}) "
            "that this model does not train or has in another shape, but its head was trained on those features. "
            f"Choose its backbone and adapter={format_text(str(saved.info['choices']['adapter']))}, with the same "
            "values."
        )
    return taken, left


def _check_head(
    builder: ModelBuilder, model: SegmentationModel, offered: Checkpoint, fitting: Mapping[str, Tensor]
) -> None:
    """Refuse a checkpoint without a tensor of the model's head, unless its head differs in the number of classes only.

    All layers of a linear head or an MLP depend on that number.
    """
    theirs, ours = (
        {name for name in names if name.startswith("head.")}
        for names in ([name for _, name, _ in _checkpoint_tensors(model, offered)], trained_names(model))
    )
    if theirs.isdisjoint(fitting) and (theirs != ours or len(builder.labels.classes) == len(offered.info["classes"])):
        choices = offered.info["choices"]
        raise UserError(
            f"init={builder.value('init')}: its {count_of(len(offered.part('model')), 'tensor')} do not match this "
            f"model's head. Choose backbone={format_text(str(choices['backbone']))} "
            f"head={format_text(str(choices['head']))} with the options of its config, or leave init out."
        )


def _already_holds(value: Tensor, now: Tensor | None) -> bool:
    """Return whether a model already has this value, as for frozen tensors that a file also holds.

    For a meta tensor, equal shapes suffice.
    """
    if now is None or value.shape != now.shape:
        return False
    return value.is_meta or torch.equal(value.to(now.dtype), now)


def _check_frozen(init: str, model: SegmentationModel, saved: Checkpoint, config: Mapping[str, Any]) -> None:
    """Refuse a model whose frozen backbone differs from that of the `init` run; its checkpoint stores a hash."""
    if _frozen_dtype(config) != _frozen_dtype(saved.info["config"]):
        return  # weights of another precision have another hash
    there = saved.part("model").keys()
    skipped = quantised_names(model)
    updated = {name.partition(_UPDATES)[0] for name in there if _UPDATES in name}
    frozen = []
    for name, value in model.state_dict().items():
        if name.startswith("backbone.") and _UPDATES not in name and name not in skipped:
            layer, _, last = _strip_lora(name).rpartition(".")
            then = f"{layer}{_BASE}{last}" if layer in updated else f"{layer}.{last}"
            frozen += [(then, value)] if then not in there else []
    if fingerprint(frozen) != saved.info["frozen"].get("backbone"):
        raise UserError(
            f"init={init}: its frozen backbone weights differ from those of this model (backbone.weights, "
            "backbone.final_norm, or the blocks that are read). Set the values it was trained with."
        )


def _check_scale(init: str, saved: Checkpoint, adapter: Mapping[str, Any]) -> None:
    """Refuse LoRA updates at another scale than in their training: it is no tensor, and changes the features."""
    if not any(name.startswith("backbone.") and _UPDATES in name for name in saved.part("model")):
        return
    theirs, ours = map(_scale_of, (saved.info["config"]["adapter"], adapter))
    for key, value in theirs.items():
        if ours[key] != value:
            raise UserError(
                f"init={init}: its LoRA updates were trained with adapter.{key}={value}, not {ours[key]}, "
                "which changes the features that its head reads. Set the value of the training."
            )


def _scale_of(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that set the scale of LoRA updates, with their defaults."""
    return {"alpha": adapter.get("alpha", adapter.get("rank")), "rslora": adapter.get("rslora", False)}


def _frozen_dtype(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the dtype and the quantisation bits of a config's frozen weights."""
    return config["backbone"].get("dtype"), config["adapter"].get("bits")


def _log_loaded(
    init: str,
    model: SegmentationModel,
    saved: Checkpoint,
    taken: Mapping[str, Tensor],
    left: Sequence[str],
    classes: list[str],
) -> None:
    rest = sorted(trained_names(model) - taken.keys())
    given = [name for name in rest if name.startswith("backbone.") and _UPDATES not in name]
    new = [name for name in rest if name not in given]
    parts = [f"init={init}: {count_of(len(taken), 'tensor')} loaded from step {saved.info['progress']['step']}"]
    parts += [f"{count_of(len(given), 'tensor')} of the backbone from backbone.weights"] if given else []
    parts += [f"randomly initialised: {join_names(new, 5)}"] if new else []
    parts += [f"not loaded: {join_names(sorted(left), 5)}"] if left else []
    is_partial = any(name.startswith("head.") for name in new)
    logger.log(logging.WARNING if is_partial else logging.INFO, "%s.", "; ".join(parts))
    theirs = list(map(str, saved.info["classes"]))
    if theirs != classes and len(theirs) == len(classes):
        logger.warning("init: its classes are %s; those of the data start from them.", join_names(theirs, 20))

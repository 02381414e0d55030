"""Builders of models, datasets and optimizers from the config (losses: `criteria.py`)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from dinoseg.config.checks import check_given
from dinoseg.config.nodes import instantiate, keeping, not_set
from dinoseg.config.plain import plain
from dinoseg.core.contracts import Backbone, Head
from dinoseg.core.shapes import SegmentationData
from dinoseg.models.adapters import Frozen
from dinoseg.models.model import Segmenter
from dinoseg.training import loading
from dinoseg.training.lengths import Lengths, in_steps
from dinoseg.training.trainer import Settings
from dinoseg.utils.errors import UserError
from dinoseg.utils.tensor_files import check_file
from dinoseg.utils.wording import listed

_FILLS = ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")
_PACKAGES = ("torch", "timm", "transformers", "peft", "dinoseg")  # of modules that `allocate` takes
SPLITS = ("train", "val", "test")
_CONFORMING = {"_target_": "dinoseg.data.custom.conforming", "_partial_": True}


def model(cfg: DictConfig, *, untrained: bool = False, outlined: bool = False, initialised: bool = True) -> Segmenter:
    """Return the segmenter of a config.

    Parts that do not fit together are refused before any weights are read.

    Args:
        cfg: the whole config.
        untrained: read no weights.
        outlined: whether `outline` has already checked this config; the check is then skipped.
        initialised: initialise the parameters. Without it they stay uninitialised, for a file that holds all of them.
    """
    if not untrained:
        _check_head_file(cfg)
    if not untrained and not outlined and cfg.backbone.get("weights") != "random":
        outline(cfg)
    with nullcontext() if initialised else _NoInit():
        adapted = _adapted(cfg, untrained=untrained)
        return Segmenter(adapted, _head(cfg, adapted, untrained=untrained), **_resolution(cfg, adapted))


def multi_head(cfgs: Sequence[DictConfig], device: torch.device) -> tuple[Backbone, list[Segmenter]]:
    """Return one frozen backbone, and segmenters that share its tensors, for configs that differ only in the head.

    Each segmenter equals the result of `model` for its config, random weights included.

    Args:
        cfgs: one whole config per head.
        device: of all parts.

    Raises:
        UserError: a part of the backbone is trained, or a part does not fit.
    """
    for cfg in cfgs:
        _check_head_file(cfg)
    own = [outline(cfg).backbone for cfg in cfgs]
    if trained := next((cfg for cfg, part in zip(cfgs, own, strict=True) if part.first_trained is not None), None):
        raise UserError(
            f"adapter={trained.choices.adapter}: trainer=many_heads trains heads on one backbone, of which nothing may "
            "change. Choose adapter=frozen; or train each head with a backbone of its own, in a sweep: -m "
            "trainer=supervised head=linear,mlp."
        )
    whole = _adapted(cfgs[0], layers=sorted({layer for part in own for layer in part.layers})).to(device).eval()
    drawn = torch.get_rng_state()  # each head samples its initial weights from this state, as in a run of its own
    models = []
    for cfg, part in zip(cfgs, own, strict=True):
        if whole.patch_size != part.patch_size:
            raise UserError(
                f"head.layers={list(part.layers)}: the coarsest of these maps has a stride of {part.patch_size} px, "
                f"and that of all that the heads read together, {list(whole.layers)}, of {whole.patch_size}. Let each "
                "head read the coarsest stage too, or train them apart, in a sweep."
            )
        _lend_tensors(whole, part)
        part.eval()  # heads that run it by themselves would otherwise update its BatchNorm statistics
        torch.set_rng_state(drawn)
        models.append(Segmenter(part, _head(cfg, part), **_resolution(cfg, part)).to(device))
    return whole, models


def _lend_tensors(whole: Backbone, part: Backbone) -> None:
    """Share the tensors of `whole` with `part`, a backbone on the meta device that reads a subset of its blocks."""
    part.weights = whole.weights
    modules = dict(whole.named_modules())
    for name, own in part.named_modules():
        for key in own._parameters:
            own._parameters[key] = modules[name]._parameters[key]
        for key in own._buffers:
            own._buffers[key] = modules[name]._buffers[key]


def _adapted(cfg: DictConfig, *, untrained: bool = False, layers: Sequence[int] | None = None) -> Backbone:
    """Return the backbone of a config with its adapter; `layers` overrides the blocks that it reads."""
    adapter = instantiate(cfg.adapter, without=("lr",))
    torch.manual_seed(seed_of(cfg))
    instead: dict[str, Any] = {} if layers is None else {"layers": list(layers)}
    if untrained and "weights" in cfg.backbone:
        instead["weights"] = "random"
    bare = keeping(Backbone, instantiate(cfg.backbone, instead=instead), "backbone")
    if next(bare.parameters(), None) is None and not isinstance(adapter, Frozen):
        raise UserError("This backbone has nothing to train, as backbone=rgb. Choose adapter=frozen.")
    return adapter(bare)


def _head(cfg: DictConfig, adapted: Backbone, *, untrained: bool = False) -> Head:
    keys = plain(cfg.head)
    late = {"in_dim": adapted.dim, "num_layers": adapted.num_layers}
    if "patch_size" in keys and cfg.head.patch_size is None:  # timm backbones: known only once the model is built
        late["patch_size"] = adapted.patch_size
    weightless = {"weights": None} if untrained and "weights" in keys else None
    return keeping(Head, instantiate(cfg.head, without=("layers", "lr", *late), instead=weightless)(**late), "head")


def _resolution(cfg: DictConfig, adapted: Backbone) -> dict[str, Any]:
    """Return the checked `scale` and `longest` of `resolution` as arguments of `Segmenter`."""
    resolution = {"scale": cfg.resolution.scale, "longest": cfg.resolution.longest}
    check_given("dinoseg.models.model.Segmenter", resolution, {key: f"resolution.{key}" for key in resolution})
    _check_crop(cfg, adapted.patch_size)
    return resolution


def outline(cfg: DictConfig) -> Segmenter:
    """Return the segmenter of a config on the meta device: its parts and their shapes, without memory."""
    with torch.device("meta"), _NoInit():
        return model(cfg, untrained=True)


def allocate(empty: Segmenter) -> bool:
    """Move an `outline` to uninitialised memory on the CPU, for a file that holds all of its values.

    Returns:
        False for an unchanged model: a part of the user's own, or one with tensors besides parameters and buffers.
    """
    modules = list(empty.modules())
    if any(type(part).__module__.partition(".")[0] not in _PACKAGES or _holds_tensors(part) for part in modules):
        return False
    made: dict[int, Any] = {}  # modules may share a tensor
    for held in (held for part in modules for held in (part._parameters, part._buffers)):
        for name, value in held.items():
            if value is not None and id(value) not in made:
                fresh = torch.empty_like(value, device="cpu")
                is_parameter = isinstance(value, torch.nn.Parameter)
                made[id(value)] = torch.nn.Parameter(fresh, value.requires_grad) if is_parameter else fresh
            held[name] = None if value is None else made[id(value)]
    return True


def _holds_tensors(part: torch.nn.Module) -> bool:
    """Return whether attributes of a module hold tensors that are not registered as its parameters or buffers."""
    held = [value for name, value in vars(part).items() if name not in ("_parameters", "_buffers", "_modules")]
    while held:
        value = held.pop()
        if isinstance(value, torch.Tensor):
            return True
        if isinstance(value, Mapping):
            held += value.values()
        elif isinstance(value, list | tuple | set):
            held += value
    return False


class _NoInit(TorchFunctionMode):
    """Skip the initialisation of parameters, and of meta tensors, for which torch would decompose the operation.

    Operations of a forward pass are executed: a backbone reads off their graph which parameters reach its maps.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D105
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or getattr(func, "__name__", "") in _FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.nn.Parameter) or _is_unfilled(tensor):
                return tensor
        return func(*args, **kwargs)


def _is_unfilled(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.grad_fn is None


def _check_crop(cfg: DictConfig, patch_size: int) -> None:
    crop = plain(cfg.resolution, resolve=True)["crop"]
    if isinstance(crop, list) and {*map(type, crop)} == {int} and min(crop) * cfg.resolution.scale < patch_size:
        raise UserError(
            f"resolution.crop={crop} with resolution.scale={cfg.resolution.scale} is less than one patch of the "
            f"backbone, {patch_size} pixels. Give a larger crop."
        )


def check_fits(cfg: DictConfig, file: loading.Checkpoint) -> Segmenter:
    """Refuse a checkpoint that does not fit the model of a config, before the model is built; return its `outline`.

    The outline is built on the meta device, with no more parts and parameters than this machine could hold.

    Args:
        cfg: merged with the config of the checkpoint.
        file: the checkpoint's outline.

    Raises:
        UserError: the checkpoint does not fit, or the model is too large; the message names the part.
    """
    try:
        with loading.bounded(f"resume={file.path}"):
            empty = outline(cfg)
    except UserError:
        raise
    except Exception as error:  # invalid values raise different errors in each part
        lost = isinstance(error, OmegaConfBaseException) and f"{error.full_key} has no value that can be used"
        said = lost or f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no more'])[0][:200]}"
        raise UserError(
            f"resume={file.path}: no model can be made of its config ({said}). Correct the "
            "keys given beside it, or choose another checkpoint."
        ) from error
    # the source of the weights decides which tensors count as trained
    empty.backbone.weights = cfg.backbone.get("weights", empty.backbone.weights)
    empty.head.weights = cfg.head.get("weights", empty.head.weights)
    loading.check_fits(empty, file)
    loading.check_size(empty, f"resume={file.path}")
    return empty


def check_split(split: str) -> None:
    """Refuse an unknown name of a split.

    Raises:
        UserError: the name is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise UserError(f"split={split} is unknown. Choose one of {', '.join(SPLITS)}.")


def backbone(cfg: DictConfig) -> Backbone:
    """Return the backbone of a config without adapter, frozen and in eval mode."""
    torch.manual_seed(seed_of(cfg))
    return keeping(Backbone, instantiate(cfg.backbone), "backbone").requires_grad_(False).eval()


def _check_head_file(cfg: DictConfig) -> None:
    """Refuse an unset or missing file of head weights, before the backbone's weights are downloaded."""
    weights = plain(cfg.head).get("weights")
    if weights == "???":
        raise UserError(not_set("head.weights"))
    if weights is not None:
        check_file(Path(str(weights)).expanduser(), "head.weights")


def reader(cfg: DictConfig, instead: Mapping[str, Any] | None = None) -> Callable[[str], SegmentationData]:
    """Return the function that maps a split to a config's dataset as read from its files, before `data.opened`.

    Args:
        cfg: the whole config; only `data` is read.
        instead: overrides of the reader's own values.

    Raises:
        UserError: no reader is configured. The returned function raises it for any fault of the dataset, see
            `conforming`.
    """
    data, node = cfg.data, cfg.data.get("reader")
    if not OmegaConf.is_dict(node) or "_target_" not in node or not node.get("_partial_"):
        raise UserError(
            f"data={cfg.choices.data}: `reader` must name a class or function that takes `split`. Set in its YAML file "
            "`_target_: MODULE.NAME` and `_partial_: true` below `reader`."
        )
    find, conforming = instantiate(node, instead=instead), instantiate(_CONFORMING)
    return lambda split: conforming(find(split=split), list(data.classes), data.ignore_index)


def dataset(
    cfg: DictConfig, split: str, *, reduced: bool = False, decided: Callable[[Callable[[], bool]], bool] | None = None
) -> SegmentationData:
    """Return one split of a config's dataset.

    Args:
        cfg: the whole config.
        split: train, val or test.
        reduced: open it for training: packed images may be stored at the model's input size, and pseudo-labels
            (`data.reader.pseudo`) are included.
        decided: runs a check on rank 0 and returns its result on every rank; None: there is only one rank.

    Raises:
        UserError: the split is unknown, or the dataset has a fault.
    """
    check_split(split)
    # pseudo-labels are no ground truth to score against
    drawn_alone = {"pseudo": False} if "pseudo" in (cfg.data.get("reader") or ()) and not reduced else None
    pairs = reader(cfg, drawn_alone)(split)
    more: dict[str, Any] = {} if decided is None else {"decided": decided}
    if reduced and split == "train" and cfg.data.get("labelled") is not None:
        labelled = {"labelled": cfg.data.labelled}
        check_given("dinoseg.data.opened.opened", labelled, {"labelled": "data.labelled"})
        more |= {**labelled, "group": cfg.data.group, "seed": seed_of(cfg)}
    return instantiate(cfg.data.opened)(pairs, split=split, reduced=reduced, **more)


def clips(cfg: DictConfig, split: str) -> Any:
    """Return one split of a config's videos as clips of frames (`dinoseg.data.clips.cut.Clips`).

    Raises:
        UserError: the split is unknown, the data are no videos, or the dataset has a fault.
    """
    check_split(split)
    if cfg.data.clips is None:
        raise UserError(
            f"data={cfg.choices.data} has no clips. Choose data=davis2016, davis2017, youtube_vos, movi or videos."
        )
    return instantiate(cfg.data.clips)(split=split)


def loss_has_classes(cfg: DictConfig) -> bool:
    """Return whether the loss is computed from labels, whose classes it can weight; losses on clips are not."""
    return cfg.loss.class_weights is not None


def background_of(cfg: DictConfig) -> int | None:
    """Return the class ID of the background, as named by `data.background`; None if every class is an object.

    Raises:
        UserError: the dataset has no class of this name.
    """
    value = cfg.data.background if "background" in cfg.data else None
    names = list(map(str, cfg.data.classes))
    if value is None or value in names:
        return None if value is None else names.index(value)
    if type(value) is int and 0 <= value < len(names):
        return value
    raise UserError(
        f"data.background={value} is no class. Give the name or the id of one (0 to {len(names) - 1}: "
        f"{listed(names)}), or null where each class is something."
    )


def optimizer(cfg: DictConfig, model: Segmenter) -> Optimizer:
    """Return the optimizer of a config over a model's trainable parameters."""
    return instantiate(cfg.optim.optimizer)(model)


def lengths(cfg: DictConfig, samples: int) -> Lengths:
    """Return the number of training steps of a config and its validation interval, for `samples` training samples.

    Raises:
        UserError: no length is configured, or a value is out of range.
    """
    options = {key: cfg.trainer.get(key) for key in ("steps", "epochs", "val_every")}
    options |= {"batch_size": cfg.data.batch_size, "accumulate": cfg.trainer.accumulate}
    names = {key: f"{'data' if key == 'batch_size' else 'trainer'}.{key}" for key in options}
    check_given("dinoseg.training.lengths.in_steps", options, names)
    return in_steps(samples, **options)


def loop_settings(cfg: DictConfig, lengths: Mapping[str, Any]) -> Settings:
    """Return the settings of a config's training loop.

    Args:
        cfg: the whole config.
        lengths: settings in steps, such as `steps`, which override those of the config.
    """
    return instantiate(cfg.trainer.loop, instead=lengths)()


def seed_of(cfg: DictConfig) -> int:
    """Return the seed of all random numbers of a run.

    Raises:
        UserError: the seed is not a non-negative integer.
    """
    if not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise UserError(f"seed={cfg.seed}: give a whole number that is not negative.")
    return cfg.seed

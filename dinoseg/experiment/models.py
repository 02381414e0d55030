"""Builder of models from the config."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinoseg.config.nodes import argument_keys, check_arguments, check_partial, expect_type, instantiate, not_set
from dinoseg.config.plain import to_container
from dinoseg.config.resolvers import register_resolvers
from dinoseg.core.channels import PixelFormat
from dinoseg.core.contracts import Backbone, Head
from dinoseg.core.task import SEMANTIC, ObjectTask, Task
from dinoseg.data.classes.labels import Labels
from dinoseg.inference.strategy import InferenceStrategy
from dinoseg.models.model import SegmentationModel
from dinoseg.models.no_init import NoInit
from dinoseg.training import loading
from dinoseg.training.engine import Engine
from dinoseg.utils.collection import collection_paused
from dinoseg.utils.errors import UserError, name_parameters
from dinoseg.utils.files import check_file
from dinoseg.utils.ranges import Natural, check_value

# keys besides the arguments of a part
_READ_ELSEWHERE = {
    "adapter": ("lr",),
    "head": ("layers", "lr", "scoring"),
    "inference": ("min_region", "largest_component", "regions"),
}
_WITH_WEIGHTS = ("adapter", "head", "loss.criterion")


class ModelBuilder:
    """Builder of the model that a config describes. It instantiates each config node once; models are new ones.

    Args:
        cfg: the whole config.

    Attributes:
        options: the selected option of each config group, such as {"head": "linear"}; for messages.
    """

    def __init__(self, cfg: DictConfig) -> None:
        register_resolvers()
        self._cfg = cfg
        self._parts: dict[tuple[str, bool], Any] = {}  # by full key, and whether on the meta device
        self.options: Mapping[str, str] = cfg.get("choices") or {}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Return the builder of a plain config, in any process."""
        return cls(OmegaConf.create(dict(config)))

    def with_changes(self, changes: Mapping[str, Any]) -> Self:
        """Return a builder of the same config with `changes`, a nested mapping, merged into it."""
        return type(self)(OmegaConf.merge(self._cfg, changes))  # type: ignore[arg-type]

    @property
    def cfg(self) -> DictConfig:
        """The whole config."""
        return self._cfg

    @property
    def resume(self) -> str | None:
        """The checkpoint that the config names; None: it names none."""
        return self._cfg.get("resume")

    @property
    def members(self) -> list[Self]:
        """The builders of the further models of an ensemble, whose first one this config describes."""
        return [self.of(config) for config in self.config.get("members", ())]

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoint that the config names, and those of the further members of an ensemble."""
        return [str(builder.resume) for builder in (self, *self.members) if builder.resume is not None]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The whole config as plain values, with unresolved interpolations."""
        return to_container(self._cfg)

    @property
    def config_dirs(self) -> list[str]:
        """Return the folders of config groups other than the shipped one."""
        return [*self._cfg.get("config_dirs", ())]

    @property
    def yaml(self) -> str:
        """The whole config as YAML."""
        return OmegaConf.to_yaml(self._cfg)

    def settings(self, group: str) -> dict[str, Any]:
        """Return the resolved values of a config group."""
        return to_container(self._cfg[group], resolve=True)

    def value(self, key: str, default: Any = None) -> Any:
        """Return the value or config node at a full key such as `data.group`; `default` if the config lacks it."""
        return OmegaConf.select(self._cfg, key, default=default, throw_on_missing=True)

    def arguments(self, target: Callable[..., Any] | str, keys: Mapping[str, str]) -> dict[str, Any]:
        """Return config values as keyword arguments of a class or function, validated against its signature.

        Args:
            target: what takes them, or its dotted path.
            keys: from parameter names to full keys; keys that the config lacks are left out.

        Raises:
            UserError: a value has another type or is out of range; the message names its key.
        """
        absent = object()
        values = {name: self.value(key, absent) for name, key in keys.items()}
        given = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in values.items()
            if value is not absent
        }
        path = target if isinstance(target, str) else f"{target.__module__}.{target.__qualname__}"
        check_arguments(path, given, keys)
        return given

    def part(self, key: str) -> Any:
        """Return the object of the config node at a full key such as `data.augment`, the same one each time.

        A `_partial_` node gives a callable that takes the remaining arguments. The meta device has objects of its own,
        and what may hold weights is a new object each time, initialised by the seed that its user has set.
        """
        is_meta = torch.get_default_device().type == "meta"
        if key in _WITH_WEIGHTS and not is_meta:
            return self._instantiate(key)
        if (key, is_meta) not in self._parts:
            self._parts[key, is_meta] = self._instantiate(key)
        return self._parts[key, is_meta]

    def strategy(self, classes: Sequence[str]) -> InferenceStrategy:
        """Return the inference strategy, which removes small regions if `inference` sets it.

        Args:
            classes: names of the model's classes, in the order of their IDs.

        Raises:
            UserError: the task predicts objects, and the strategy does not.
        """
        strategy: InferenceStrategy = self.part("inference")
        if self.value("inference.regions") is not None:
            strategy = self.part("inference.regions")(strategy, classes)
        reason = strategy.no_objects_reason
        if isinstance(self.task, ObjectTask) and reason is not None:
            raise UserError(reason)
        return strategy

    def _instantiate(self, key: str) -> Any:
        node = self.value(key)
        if not OmegaConf.is_dict(node):  # which names no key of its own
            raise UserError(f"{key}={node} has no `_target_`, which this config node needs. Leave it out.")
        exclude = [*_READ_ELSEWHERE.get(key, ())]
        if key == "head" and OmegaConf.is_missing(node, "weights"):  # which an outline does not read
            exclude.append("weights")
        if key == "head" and node.get("patch_size", 0) is None:  # timm states it once the backbone is built
            exclude.append("patch_size")
        return instantiate(node, exclude=exclude)

    @property
    def seed(self) -> int:
        """The seed of all random numbers of a run.

        Raises:
            UserError: the seed is not a non-negative integer.
        """
        check_value("seed", self._cfg.seed, Natural)
        return self._cfg.seed

    @cached_property
    def labels(self) -> Labels:
        """The classes, palette and ignored ID of the dataset; no file but `classes.yaml` is needed."""
        classes, palette, ignore_index = map(self.value, ("data.classes", "data.palette", "data.ignore_index"))
        return Labels.of(classes, palette, ignore_index, has_layers=self.task.has_layers)

    @cached_property
    def task(self) -> Task:
        """The task, which states what the model predicts for a pixel; one class each if the config has no task."""
        return SEMANTIC if self.value("task") is None else self.part("task")

    @cached_property
    def pixels(self) -> PixelFormat:
        """The format of the images of the dataset; RGB if the config has no dataset.

        Raises:
            UserError: a value is out of range, or the keys of `data.pixels` contradict each other.
        """
        keys = {name: f"data.pixels.{name}" for name in self.value("data.pixels") or {}}
        keys["channels"] = "data.channels"
        with name_parameters(keys):
            return PixelFormat(**self.arguments(PixelFormat, keys))

    def engine(self, **overrides: Any) -> Engine:
        """Return the engine of the config, with overrides of its values."""
        return instantiate(self._cfg.engine, overrides=overrides)

    @collection_paused()  # transformers and peft are imported here
    def model(self, *, untrained: bool = False, initialised: bool = True) -> SegmentationModel:
        """Return the segmenter.

        Args:
            untrained: read no weights.
            initialised: initialise the parameters. Without it they stay uninitialised, for a file that holds all of
                them.
        """
        if not untrained:
            self.check_head_file()
        with nullcontext() if initialised else NoInit():
            return self._segmenter(self._adapted_backbone(untrained=untrained), untrained=untrained)

    def outline(self) -> SegmentationModel:
        """Return the segmenter on the meta device: its parts and their shapes, without memory."""
        with torch.device("meta"), NoInit():
            return self.model(untrained=True)

    def backbone(self) -> Backbone:
        """Return the backbone without adapter, frozen and in eval mode."""
        torch.manual_seed(self.seed)
        return expect_type(Backbone, self.part("backbone"), "backbone").requires_grad_(False).eval()

    def check_fits(self, file: loading.Checkpoint) -> SegmentationModel:
        """Refuse a checkpoint that does not fit the model, before the model is built; return its `outline`.

        The outline is built on the meta device, with no more parts and parameters than this machine could hold.

        Args:
            file: the outline of the checkpoint, whose config is part of this one.

        Raises:
            UserError: the checkpoint does not fit, or the model is too large; the message names the part.
        """
        data = file.info.get("config", {}).get("data") or {}
        stored, given = data.get("channels", 3), self.value("data.channels", 3)
        if stored != given:
            raise UserError(
                f"{file.where}: its model takes images of {stored} channels, and data.channels={given}. Give "
                f"data.channels={stored} and such images, or choose another checkpoint."
            )
        try:
            with loading.limit_model_size(file.where):
                empty = self.outline()
        except UserError:
            raise
        except Exception as error:  # invalid values raise different errors in each part
            lost = isinstance(error, OmegaConfBaseException) and f"{error.full_key} has no usable value"
            message = lost or f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no details'])[0][:200]}"
            raise UserError(
                f"{file.where}: its config builds no model ({message}). Correct the overrides, or choose another "
                "checkpoint."
            ) from error
        self.name_weights(empty)
        loading.check_fits(empty, file)
        loading.check_size(empty, file.where)
        return empty

    def name_weights(self, outline: SegmentationModel) -> None:
        """Set the sources of an outline's weights, which decide which tensors count as trained."""
        for part, node in ((outline.backbone, self._cfg.backbone), (outline.head, self._cfg.head)):
            part.weights = node.get("weights", part.weights)

    def _adapted_backbone(self, *, untrained: bool = False) -> Backbone:
        """Return the backbone with its adapter."""
        adapter = self.part("adapter")
        torch.manual_seed(self.seed)
        instead = {"weights": "random"} if untrained and "weights" in self._cfg.backbone else None
        bare = expect_type(Backbone, instantiate(self._cfg.backbone, overrides=instead), "backbone")
        if bare.channels != self.value("data.channels", 3):
            raise UserError(
                f"data.channels={self.value('data.channels')}, and backbone={self.options.get('backbone')} takes "
                f"images of {bare.channels}. Choose a backbone with the key channels, or data.channels={bare.channels}."
            )
        with name_parameters(argument_keys(self._cfg.adapter)):
            return adapter(bare)

    def _segmenter(self, adapted: Backbone, *, untrained: bool = False) -> SegmentationModel:
        """Return a segmenter of a backbone and a new head."""
        keys = to_container(self._cfg.head)
        arguments: dict[str, Any] = {"in_dim": adapted.dim, "num_layers": adapted.num_layers}
        if "patch_size" in keys and self._cfg.head.patch_size is None:
            arguments["patch_size"] = adapted.patch_size
        if untrained and "weights" in keys:
            arguments["weights"] = None
        check_partial(self._cfg.head, "head")
        if "num_classes" in keys and self._cfg.head.num_classes != self.value("data.num_classes"):
            raise UserError(
                f"head.num_classes={self._cfg.head.num_classes}, and data.classes has "
                f"{self.value('data.num_classes')}. Leave head.num_classes out: it follows from the classes."
            )
        head = expect_type(Head, self.part("head")(**arguments), "head")
        sizes = self.arguments(SegmentationModel, {"scale": "resolution.scale", "longest": "resolution.longest"})
        self._check_crop(adapted.patch_size)
        num_classes = self.value("data.num_classes") if head.no_classes is None else None
        with name_parameters(argument_keys(self._cfg.head)):
            return SegmentationModel(adapted, head, task=self.task, num_classes=num_classes, **sizes)

    def _check_crop(self, patch_size: int) -> None:
        resolution = self.settings("resolution")
        crop, scale = resolution["crop"], resolution["scale"]
        if isinstance(crop, list) and {*map(type, crop)} == {int} and min(crop) * scale < patch_size:
            raise UserError(
                f"resolution.crop={crop} with resolution.scale={scale} is less than one patch of the "
                f"backbone, {patch_size} pixels. Give a larger crop."
            )

    def check_head_file(self) -> None:
        """Refuse an unset or missing file of head weights, before the backbone's weights are downloaded."""
        weights = to_container(self._cfg.head).get("weights")
        if weights == "???":
            raise not_set("head.weights")
        if weights is not None:
            check_file(Path(str(weights)).expanduser(), "head.weights")

"""The trained model that a config names, for exports and servers: its settings as plain values and its parts."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinoseg.config.plain import plain
from dinoseg.core.shapes import SegmentationData
from dinoseg.experiment import build
from dinoseg.experiment.recipe import config_description
from dinoseg.experiment.trained import Trained, load_trained
from dinoseg.models.adapters import whole_state
from dinoseg.models.model import Segmenter, constants


class ModelSource:
    """Trained model that a config names. Settings are available before the model is loaded.

    Args:
        cfg: the whole config, merged with the checkpoint's.

    Attributes:
        resume: the checkpoint; None: the config names no checkpoint.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg
        self.resume: str | None = cfg.resume

    @cached_property
    def config(self) -> dict[str, Any]:
        """The whole config as plain values, with unresolved interpolations."""
        return plain(self._cfg)

    def settings(self, group: str) -> dict[str, Any]:
        """Return the resolved values of a config group."""
        return plain(self._cfg[group], resolve=True)

    @property
    def num_classes(self) -> int:
        """The number of classes of the dataset; 0 if its config lists none."""
        return len(self._cfg.data.get("classes") or ())

    def dataset(self, split: str) -> SegmentationData:
        """Return one split of the dataset.

        Raises:
            UserError: the split is unknown, or the dataset has a fault.
        """
        return build.dataset(self._cfg, split)

    def load(self) -> Trained:
        """Build the model and read its weights, see `load_trained`.

        Raises:
            UserError: the config names no trained model, or the checkpoint does not fit.
        """
        return load_trained(self._cfg)

    def load_on_cpu(self) -> Trained:
        """Load the model on the CPU, without float16 and TF32, which are settings of a GPU.

        Raises:
            UserError: as `load`.
        """
        engine = {"device": "cpu", "tf32": False}
        engine |= {"precision": "fp32"} if self._cfg.engine.precision == "fp16" else {}
        return load_trained(self._changed(engine=engine))

    def in_float32(self, trained: Segmenter) -> Segmenter:
        """Return the loaded model in float32, or itself if no weights are quantised or in half precision.

        The values do not change: NF4, 8-bit and bfloat16 weights are exact in float32.
        """
        changes: dict[str, Any] = {}
        if self._cfg.adapter.get("bits") is not None:
            changes["adapter"] = {"bits": None}
        if self._cfg.backbone.get("dtype", "float32") != "float32":
            changes["backbone"] = {"dtype": "float32"}
        if not changes:
            return trained
        model = build.model(self._changed(**changes), untrained=True).eval()
        model.load_state_dict(whole_state(trained))
        buffers = constants(model)
        for name, value in constants(trained).items():
            buffers[name].copy_(value)
        return model

    def _changed(self, **changes: Mapping[str, Any]) -> DictConfig:
        return OmegaConf.merge(self._cfg, changes)  # type: ignore[return-value]


def describe_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a plain config, see `config_description`."""
    return config_description(OmegaConf.create(dict(config)))


def outline_of(config: Mapping[str, Any]) -> Segmenter:
    """Return the segmenter of a plain config on the meta device, see `build.outline`."""
    return build.outline(OmegaConf.create(dict(config)))

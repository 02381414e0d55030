"""The trained model that a config names, for exports and servers: its settings as plain values and its parts."""

from typing import Any

from dinoseg.checkpoints.trained import TrainedModel, load_trained
from dinoseg.experiment.builder import Builder
from dinoseg.models.adapters import dequantised_state
from dinoseg.models.model import SegmentationModel, non_persistent_buffers


class ModelSource(Builder):
    """Builder of the trained model that a config names. Settings are available before the model is loaded.

    The config is merged with that of the checkpoint.
    """

    @property
    def num_classes(self) -> int:
        """The number of classes of the dataset; 0 if its config lists none."""
        return len(self.value("data").get("classes") or ())

    def load(self) -> TrainedModel:
        """Build the model and read its weights, see `load_trained`.

        Raises:
            UserError: the config names no trained model, or the checkpoint does not fit.
        """
        return load_trained(self)

    def load_on_cpu(self) -> TrainedModel:
        """Load the model on the CPU, without float16 and TF32, which are settings of a GPU.

        Raises:
            UserError: as `load`.
        """
        engine = {"device": "cpu", "tf32": False}
        engine |= {"precision": "fp32"} if self.value("engine.precision") == "fp16" else {}
        return load_trained(self.with_changes({"engine": engine}))

    def in_float32(self, trained: SegmentationModel) -> SegmentationModel:
        """Return the loaded model in float32, or itself if no weights are quantised or in half precision.

        The values do not change: NF4, 8-bit and bfloat16 weights are exact in float32.
        """
        changes: dict[str, Any] = {}
        if self.value("adapter.bits") is not None:
            changes["adapter"] = {"bits": None}
        if self.value("backbone.dtype", "float32") != "float32":
            changes["backbone"] = {"dtype": "float32"}
        if not changes:
            return trained
        model = self.with_changes(changes).model(untrained=True).eval()
        model.load_state_dict(dequantised_state(trained))
        model.task = trained.task  # with the thresholds of the checkpoint
        buffers = non_persistent_buffers(model)
        for name, value in non_persistent_buffers(trained).items():
            buffers[name].copy_(value)
        return model

"""Checkpoints and one-file models of a second, made without a training."""

import onnx
import torch
from command_line import TINY as TINY

from dinoseg.checkpoints.resume import standalone_config
from dinoseg.checkpoints.source import ModelSource
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import run_description
from dinoseg.extensions.export.onnx_record import KEY
from dinoseg.segmenter.write import export_model
from dinoseg.training import checkpoint
from dinoseg.training.loading import frozen_fingerprint

PROGRESS = {"step": 3, "best": 0.5, "best_step": 3, "stale": 0, "validation_pending": False}


def write_untrained(compose, folder, *words, **info):
    """Write the checkpoint of a model whose trained weights are random, with other `info` in it; return its path."""
    cfg = compose("data=folder", "data.classes=[dark,bright]", "data.root=/data/of/mine", "engine=cpu", *words)
    build = Builder(cfg)
    model = build.model()
    torch.manual_seed(1)
    for value in model.parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, std=0.1)
    names = checkpoint.trained_names(model)
    tensors = {f"model/{name}": value for name, value in model.state_dict().items() if name in names}
    described = run_description(build, build.labels) | {"progress": PROGRESS, "frozen": frozen_fingerprint(model)}
    path = folder / "run" / "checkpoints" / "best.safetensors"
    checkpoint.write(path, tensors, described | info)
    return path


def untrained_config(compose, folder, *words, **info):
    """Return the config that opens a tiny untrained model with a linear head, with the data set of `folder`/data."""
    path = write_untrained(compose, folder, *TINY, "head=linear", *words, **info)
    changes = {"engine.device": "cpu", "data.root": str(folder / "data")}
    return standalone_config(path, checkpoint.describe(path), changes, unused=())


def export_file(path, folder, **options):
    """Write the one-file model of a checkpoint and return its path."""
    cfg = standalone_config(path, checkpoint.describe(path), {"engine.device": "cpu"})
    folder.mkdir(exist_ok=True)
    return folder / export_model(ModelSource(cfg), out_dir=folder, **options)["path"]


def graph_with_weights(folder, data, *, name="model.onnx"):
    """Write a graph of one tensor, which lies in a file `data` beside it or, where that is None, in it."""
    tensor = onnx.TensorProto(name="far", data_type=onnx.TensorProto.FLOAT, dims=[2])
    if data is None:
        tensor.raw_data = b"weights."
    else:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", data), ("length", "8")):
            tensor.external_data.add(key=key, value=value)
        (folder / data).write_bytes(b"weights.")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "graph", [], [], [tensor]))
    model.metadata_props.add(key=KEY, value="{}")
    (folder / name).write_bytes(model.SerializeToString())
    return folder / name

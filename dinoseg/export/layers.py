"""Search for the layer of an exported file that computes something else than the trained model."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from dinoseg.export.graph import Graph
from dinoseg.export.proof import Reference
from dinoseg.export.runtime.onnx_model import open_session
from dinoseg.export.runtime.onnx_pictures import bands, pixels
from dinoseg.export.runtime.onnx_record import OUTPUTS
from dinoseg.utils.images import read_image

# largest absolute difference over the trained model's largest absolute value, above which a layer differs
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "int8": 5e-2}


def differing_layer(file: Path, scopes: Mapping[str, str], reference: Reference, picture: Path) -> str:
    """Describe the first layer, in the graph's order of computation, whose output differs.

    The preprocessing before the graph (resizing, padding) and the upsampling after it are compared, too.

    Args:
        file: the ONNX file that failed verification.
        scopes: module of the traced model to the name of its output tensor.
        reference: the model that was traced.
        picture: the image on which they are compared.
    """
    record, image = reference.record, read_image(picture)
    layout = record.layout((image.shape[0], image.shape[1]))
    entering = pixels(image, layout, record.fill)[None]
    wanted = reference.pixels(torch.from_numpy(image[None].copy()).permute(0, 3, 1, 2))
    tolerance = TOLERANCE[record.precision]
    if _difference(entering, wanted.numpy()) > tolerance:
        return "the resizing of images before the first layer"
    expected = _module_outputs(Graph(reference.segmenter, record), wanted, scopes)
    given = _tensors(file, [scopes[scope] for scope in expected], entering)
    ordered = [name for name in given if name in set(scopes.values())]
    of_tensor = {scopes[scope]: scope for scope in reversed(expected)}  # the innermost module wins
    worst = ("", 0.0)
    for name in ordered:
        scope = of_tensor.get(name)
        if scope is None or given[name].shape != expected[scope].shape:
            continue
        difference = _difference(given[name], expected[scope])
        if difference > tolerance:
            return f"the layer {scope} (its output differs by {difference:.1%} of its largest value)"
        worst = max(worst, (scope, difference), key=lambda entry: entry[1])
    outputs = [given[name][0] for name in OUTPUTS[record.kind]]
    scores = np.concatenate(list(bands(outputs, image.shape[:2], layout.valid, record)), axis=1)
    if _difference(scores, reference.scores(image)) > tolerance:
        return "the operations after the last layer, up to the classes of each pixel"
    return f"no single layer: small differences add up (the largest, {worst[1]:.2%}, in {worst[0]})"


def _module_outputs(graph: nn.Module, entering: Tensor, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return the tensor outputs of the named modules, each of its module's last call."""
    found: dict[str, np.ndarray] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):  # several outputs do not show which one the graph computes last
                found[name] = output.float().numpy()

        return hook

    handles = [part.register_forward_hook(note(name)) for name, part in graph.named_modules() if name in names]
    try:
        with torch.inference_mode():
            graph(entering)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _tensors(file: Path, names: Sequence[str], entering: np.ndarray) -> dict[str, np.ndarray]:
    """Return tensors of an ONNX file by name, in the order of computation, with the graph's outputs last."""
    model = onnx.load(str(file))
    made = [name for node in model.graph.node for name in node.output]
    outputs = [entry.name for entry in model.graph.output]
    wanted = [name for name in made if name in set(names) and name not in outputs]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "layers.onnx")
        onnx.save_model(model, str(path), save_as_external_data=True, location="layers.data")
        session = open_session(path, device="cpu")
        values = session.run([*wanted, *outputs], {"image": entering})
    return dict(zip([*wanted, *outputs], values, strict=True))


def _difference(given: np.ndarray, expected: np.ndarray) -> float:
    largest = max(float(np.abs(expected).max()), 1e-6)
    return float(np.abs(given.astype(np.float32) - expected).max()) / largest

"""export=onnx: a trained model as an ONNX file, verified on real images."""

import importlib
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from dinoseg.core.sizes import Size
from dinoseg.experiment.source import ModelSource
from dinoseg.export import onnx_file
from dinoseg.export.export import prepared, store_if_verified
from dinoseg.export.graph import Graph, trace
from dinoseg.export.options import GraphOptions
from dinoseg.export.proof import Reference
from dinoseg.export.runtime.onnx_model import open_session
from dinoseg.export.runtime.onnx_pictures import bands, pixels
from dinoseg.export.runtime.onnx_record import OUTPUTS, PRECISIONS, GraphRecord
from dinoseg.utils.atomic import atomic_file
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_image
from dinoseg.utils.ranges import Count

NAME = "model.onnx"


# largest absolute difference over the trained model's largest absolute value, above which a layer differs
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "int8": 5e-2}


SUFFIX = ".engine"
_MIN, _MAX, _BATCH = 16, 64, 8  # patch rows and columns that a dynamic engine always supports; largest batch
_ONNX_SAVED = "The ONNX file is verified and saved. See the output of TensorRT above; another export.opset may help."
Shape = tuple[int, int, int, int]  # (B, 3, H, W)


@dataclass(frozen=True, kw_only=True)
class OnnxExport(GraphOptions):
    """ONNX export and its options; calling it writes the file.

    Attributes:
        opset: version of ONNX's operators, at least 18.
        precision: type of the stored weights: float32, float16, or int8 with one scale per output channel. The graph
            computes in float32.
        tensorrt: also build a TensorRT engine from the file, where TensorRT is installed.

    Raises:
        UserError: if the opset or precision is unsupported, TensorRT is missing, or as `GraphOptions`.
    """

    opset: Count = 18
    precision: str = "float32"
    tensorrt: bool = False

    def __post_init__(self) -> None:
        """Refuse options that this machine cannot fulfil."""
        super().__post_init__()
        onnx_file.check_opset(self.opset)
        if self.precision not in PRECISIONS:
            raise UserError(f"export.precision={self.precision} is unknown. Choose one of {', '.join(PRECISIONS)}.")
        if self.tensorrt:
            check_tensorrt()

    def __call__(self, source: ModelSource, *, out_dir: Path) -> dict[str, Any]:
        """Write a trained model to `out_dir`/model.onnx once it is verified, with its report next to it.

        Args:
            source: the trained model.
            out_dir: the run folder.

        Raises:
            UserError: if the model cannot be exported, or the file disagrees with it; no model file is left then.
        """
        with prepared(source, out_dir, self, opset=self.opset, precision=self.precision) as ready:
            model = onnx_file.to_onnx(trace(ready.model, ready.record), ready.record)
            scopes = onnx_file.scopes_of(model)
            onnx_file.finish(model, ready.record, ready.facts.description())
            files = onnx_file.write(model, ready.folder / NAME)
            first = ready.pictures[0].path
            whole = Reference(ready.model, ready.record)
            explain = lambda: differing_layer(files[-1], scopes, whole, first)  # noqa: E731
            report = store_if_verified(ready, "onnx", files, out_dir, self, explain)
        path = out_dir / NAME
        print(f'use: import dinoseg; model = dinoseg.load("{path}"); out = model.predict("picture.jpg")')
        sizes = [ready.record.layout(picture.size).padded for picture in ready.pictures]
        engine = {"engine": str(build_engine(path, ready.record, sizes))} if self.tensorrt else {}
        return {"path": str(path), "agreement": report["agreement"], **engine}


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


def check_tensorrt() -> None:
    """Refuse to build an engine where TensorRT is not installed.

    Raises:
        UserError: if both trtexec and the Python package are missing.
    """
    if shutil.which("trtexec") is None and find_spec("tensorrt") is None:
        raise UserError(
            "export.tensorrt=true: neither trtexec nor the Python package tensorrt is installed. Install TensorRT on "
            "the machine with the GPU that the engine is for, or build it there from model.onnx."
        )


def build_engine(path: Path, record: GraphRecord, sizes: Sequence[Size]) -> Path:
    """Build the engine of a verified ONNX file next to it, and return its path.

    The engine itself is not verified.

    Args:
        path: the ONNX file.
        record: of its graph.
        sizes: (H, W) of images at the graph's input; a dynamic engine supports these and sizes between them.

    Raises:
        UserError: if TensorRT is missing or fails; the message quotes its reason.
    """
    check_tensorrt()
    engine_path = path.with_suffix(SUFFIX)
    with atomic_file(engine_path) as part:
        build = _by_command if shutil.which("trtexec") is not None else _by_package
        build(path, part, shapes(record, sizes))
    print(
        f"written to {engine_path}: {engine_path.stat().st_size / 1e6:.2f} MB, for this GPU and TensorRT "
        "version only; not verified"
    )
    return engine_path


def shapes(record: GraphRecord, sizes: Sequence[Size]) -> list[Shape]:
    """Return the smallest, most common and largest input shape of an engine; a single one for a fixed-size graph."""
    if record.size is not None:
        return [(record.batch or 1, 3, *record.size)]
    least = min(_MIN * record.multiple, *(min(size) for size in sizes))
    most = max(_MAX * record.multiple, *(max(size) for size in sizes))
    return [(1, 3, least, least), (1, 3, *sizes[0]), (_BATCH, 3, most, most)]


def _by_command(path: Path, part: Path, profile: Sequence[Shape]) -> None:
    words = ["trtexec", f"--onnx={path}", f"--saveEngine={part}", "--skipInference"]
    if len(profile) > 1:
        named = zip(("minShapes", "optShapes", "maxShapes"), profile, strict=True)
        words += [f"--{name}=image:{'x'.join(map(str, size))}" for name, size in named]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not part.is_file() or not part.stat().st_size:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise UserError(f"trtexec could not build an engine from {path} ({lines[-1][:300]}). {_ONNX_SAVED}")


def _by_package(path: Path, part: Path, profile: Sequence[Shape]) -> None:
    try:
        part.write_bytes(_engine(importlib.import_module("tensorrt"), path, profile))
    except (UserError, OSError):
        raise
    except Exception as error:  # raises many types, as without a GPU or with a mismatched driver
        raise UserError(f"TensorRT could not build an engine from {path} ({error}). {_ONNX_SAVED}") from error


def _engine(tensorrt: Any, path: Path, profile: Sequence[Shape]) -> bytes:
    log = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(log)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        reasons = "; ".join(parser.get_error(number).desc() for number in range(parser.num_errors)) or "no reason"
        raise UserError(f"TensorRT cannot read {path} ({reasons[:300]}). {_ONNX_SAVED}")
    config = builder.create_builder_config()
    if len(profile) > 1:
        sizes = builder.create_optimization_profile()
        sizes.set_shape("image", *profile)
        if config.add_optimization_profile(sizes) < 0:
            raise UserError(f"TensorRT does not accept the sizes {list(profile)} of {path}. {_ONNX_SAVED}")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"TensorRT could not build an engine from {path}. {_ONNX_SAVED}")
    return bytes(engine)

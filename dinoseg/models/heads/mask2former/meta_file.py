"""Strict loading of a segmentor checkpoint in Meta's layout: every key and shape is checked."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dinoseg.utils.errors import UserError
from dinoseg.utils.tensor_files import check_weights, read_tensor_file

ADAPTER = "segmentation_model.0."
HEAD = "segmentation_model.1."
BACKBONE = f"{ADAPTER}backbone."
CLASS_LAYER = f"{HEAD}predictor.class_embed."

logger = logging.getLogger(__name__)

# how tensor shapes identify the segmentor of a file: value, tensor, axis, divisor and remedy
TELLING = (
    ("the backbone's width", f"{ADAPTER}level_embed", 1, 1, "choose the backbone of the file"),
    ("hidden_dim", f"{HEAD}predictor.post_norm.weight", 0, 1, "set head.hidden_dim={}"),
    ("num_heads", f"{ADAPTER}interactions.0.extractor.attn.attention_weights.bias", 0, 4, "set head.num_heads={}"),
    ("feedforward_dim", f"{HEAD}predictor.transformer_ffn_layers.0.linear1.bias", 0, 1, "set head.feedforward_dim={}"),
    ("num_queries", f"{HEAD}predictor.query_feat.weight", 0, 1, "set head.num_queries={}"),
    ("class outputs", f"{CLASS_LAYER}bias", 0, 1, "for other classes than the file's set head.class_layer=new"),
)


def load_segmentor(head: nn.Module, path: str, *, new_class_layer: bool) -> int:
    """Load adapter, pixel decoder and predictor of a head from a file; return the number of ignored backbone keys.

    The backbone has its own weights: keys below `segmentation_model.0.backbone.` are allowed and ignored.

    Args:
        head: has the modules `adapter`, `pixel_decoder` and `predictor`; on the meta device it is only checked.
        path: Meta's `.pth` checkpoint, or a safetensors file with the same names.
        new_class_layer: expect the file's class layer, for any number of classes, but do not load it.

    Raises:
        UserError: the file cannot be read, keys are missing or unexpected, shapes do not fit, or tensors are not
            finite.
    """
    tensors = read_tensors(path)
    passed_over = [key for key in tensors if key.startswith(BACKBONE)]
    tensors = {key: value for key, value in tensors.items() if not key.startswith(BACKBONE)}
    wanted = {meta_name(name): tensor for name, tensor in head.state_dict().items()}
    _check_names(path, tensors.keys(), wanted.keys())
    if new_class_layer:
        wanted = {key: tensor for key, tensor in wanted.items() if not key.startswith(CLASS_LAYER)}
    _check_shapes(path, tensors, wanted)
    check_weights(tensors, f"head.weights={path}", wanted)
    with torch.no_grad():
        for key, tensor in wanted.items():
            if not tensor.is_meta:
                tensor.copy_(tensors[key])
    if passed_over:
        logger.info("head.weights=%s: ignored %d keys of a backbone, which has its own weights", path, len(passed_over))
    return len(passed_over)


def meta_name(name: str) -> str:
    """Return Meta's name for a parameter or buffer of the head."""
    part, _, rest = name.partition(".")
    return f"{ADAPTER}{rest}" if part == "adapter" else f"{HEAD}{name}"


def read_tensors(path: str) -> dict[str, Tensor]:
    """Return the tensors of a `.pth` or `.safetensors` file by name, without running pickled code.

    Raises:
        UserError: the file does not exist, cannot be read, or holds anything but tensors.
    """
    tensors = read_tensor_file(Path(path).expanduser(), "head.weights")
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"head.weights={path}: not a plain dict of tensors. Give Meta's segmentor checkpoint.")
    return dict(tensors)


def _check_names(path: str, in_file: Collection[str], expected: Collection[str]) -> None:
    missing = [key for key in expected if key not in in_file]
    left_over = [key for key in in_file if key not in expected]
    problems = [
        f"{len(keys)} {what} ({', '.join(map(str, keys[:3]))}{', ...' * (len(keys) > 3)})"
        for what, keys in (("missing", missing), ("unexpected", left_over))
        if keys
    ]
    if problems:
        raise UserError(
            f"head.weights={path}: of the {len(expected)} keys of a Mask2Former segmentor, {'; '.join(problems)}. "
            f"Give the whole file of Meta's segmentor, such as dinov3_vit7b16_ade20k_m2f_head-*.pth."
        )


def _check_shapes(path: str, in_file: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    wrong = [key for key, tensor in expected.items() if in_file[key].shape != tensor.shape]
    if not wrong:
        return
    differences = []
    for name, key, axis, divisor, remedy in TELLING:
        if key in wrong:
            theirs, ours = (tensors[key].shape[axis] // divisor for tensors in (in_file, expected))
            differences.append(f"{name} is {theirs} in the file and {ours} in the model ({remedy.format(theirs)})")
    first = wrong[0]
    differences = differences or [
        f"{first} is {tuple(in_file[first].shape)} in the file and {tuple(expected[first].shape)} in the model"
    ]
    raise UserError(f"head.weights={path}: {len(wrong)} tensors have another shape: {'; '.join(differences)}.")

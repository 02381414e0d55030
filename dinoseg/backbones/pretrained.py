"""Weights of transformers' models: from the hub, a folder, a safetensors file, the package, or at random."""

import re
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dinoseg.errors import UserError

PACKAGED = "dinoseg:"  # weights=dinoseg:NAME is a file that ships inside the package
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def load_model(config: Any, weights: str) -> Any:
    """Return the model of a transformers configuration with its weights, in float32.

    Args:
        config: decides the architecture; weights of another one are refused.
        weights: a hub id (`id` or `id@revision`), a local folder, a safetensors file, `dinoseg:NAME` or `random`.

    Raises:
        UserError: the weights cannot be had or read, or do not fit.
    """
    from transformers import AutoModel

    if weights == "random":
        return AutoModel.from_config(config)
    if weights.startswith(PACKAGED):
        path = Path(str(files("dinoseg"))) / "assets" / f"{weights.removeprefix(PACKAGED)}.safetensors"
    else:
        path = Path(weights).expanduser()
    if path.is_file():
        return _from_file(config, path)
    if path.is_dir():
        return _from_pretrained(weights, str(path), config=config)
    if not _HUB_ID.fullmatch(weights) or path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        raise UserError(f"backbone.weights={weights}: no such file or folder. Check the path.")
    name, _, revision = weights.partition("@")
    return _from_pretrained(weights, name, config=config, revision=revision or "main")


def exported_state(model: Any) -> dict[str, Tensor]:
    """Return a model's weights under the names of the files on the hub, which all versions of transformers read.

    Raises:
        UserError: the model holds LoRA updates.
    """
    if any(".lora_" in name for name in model.state_dict()):
        raise UserError(
            "This backbone holds LoRA updates, which are no weights of their own: export a run of adapter=full."
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, safe_serialization=True)
        return {key: value for path in Path(folder).glob("*.safetensors") for key, value in load_file(path).items()}


def _from_file(config: Any, path: Path) -> nn.Module:
    from transformers import MODEL_MAPPING

    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"backbone.weights={path}: not a readable safetensors file ({error}). Download or export it again."
        ) from error
    return _from_pretrained(str(path), None, model_class=MODEL_MAPPING[type(config)], config=config, state_dict=state)


def _from_pretrained(weights: str, source: str | None, *, model_class: Any = None, **options: Any) -> nn.Module:
    from transformers import AutoModel

    loader: Any = model_class or AutoModel
    # no pickles; what does not fit is listed rather than raised, and refused below
    options |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = loader.from_pretrained(source, dtype=torch.float32, **options)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"backbone.weights={weights}: no such folder is here, and the weights cannot be fetched ({reason}). "
            f"If they are gated, accept the licence on the model's hub page and log in with `hf auth login`; without a "
            f"network, give a downloaded folder or safetensors file: backbone.weights=PATH; to try things out "
            f"untrained: backbone.weights=random."
        ) from error
    found = [key for kind in ("missing", "unexpected", "mismatched") for key in info.get(f"{kind}_keys", ())]
    wrong = sorted(key if isinstance(key, str) else key[0] for key in found)
    if wrong:
        raise UserError(
            f"backbone.weights={weights}: {len(wrong)} tensors are missing, left over or of another shape "
            f"({', '.join(wrong[:3])}, ...). Choose the backbone that these weights were made for."
        )
    return model

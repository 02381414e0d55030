"""Configurations of transformers models, and their weights: hub, folder, file, packaged asset, or random."""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dinoseg.models.backbones.meta_weights import INV_FREQ, LOCAL_CLS_NORM, from_meta, is_meta, unwrap
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import WEIGHT_SUFFIXES, check_exists, check_regular, expand_path
from dinoseg.utils.tensor_files import check_weights, outline, read_tensor_file

_ADAPTER = "adapter_config.json"  # marks a peft adapter
_INDEX = "model.safetensors.index.json"
_SHARDS = forms.object_with(weight_map=forms.table(forms.text))
_INPUT_KERNELS = {  # hub's names of the weights that read the pixels, (dim, channels, h, w)
    "embeddings.patch_embeddings.weight",
    "embeddings.patch_embeddings.projection.weight",
    "stages.0.downsample_layers.0.weight",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def configuration(model_type: str, values: Mapping[str, Any]) -> Any:
    """Return a transformers configuration of a model type, which refuses values of a wrong type itself.

    Args:
        model_type: name of the model type in transformers.
        values: the values of `arch`, plus `patch_size` for models that have one.

    Raises:
        UserError: unknown key, or a value that transformers would accept and compute something else with.
    """
    from transformers import AutoConfig, PretrainedConfig

    # keys common to all transformers models (labels, dtypes, names) do not belong to the architecture
    known = AutoConfig.for_model(model_type).to_dict().keys() - PretrainedConfig().to_dict().keys()
    unknown = sorted(values.keys() - known)
    if unknown:
        raise UserError(f"arch: {model_type} has no {', '.join(unknown)}. Check the key's spelling.")
    config = AutoConfig.for_model(model_type, **values)
    drop_path = getattr(config, "drop_path_rate", 0)
    if not 0 <= drop_path < 1:
        raise UserError(f"arch.drop_path_rate={drop_path}: give a probability, at least 0 and below 1.")
    if model_type == "dinov3_convnext":
        if len(config.hidden_sizes) != len(config.depths):
            raise UserError(
                f"arch.depths={config.depths} and arch.hidden_sizes={config.hidden_sizes} differ in length. Give one "
                "of each for every stage."
            )
        return config
    heads = config.num_attention_heads
    part = 4 * heads if model_type == "dinov3_vit" else heads  # 2D RoPE: channel pairs along two axes
    if config.hidden_size % part:
        raise UserError(
            f"arch.num_attention_heads={heads} with arch.hidden_size={config.hidden_size}: the width must be a "
            f"multiple of {part}. Change one of the two."
        )
    return config


def load_model(config: Any, weights: str, cut: Callable[[Any], None], local_cls_norm: nn.Module | None = None) -> Any:
    """Return the model of a transformers configuration in float32, with its weights and without the cut parts.

    A safetensors or PyTorch file may use the hub's names or Meta's (`meta_weights`). PyTorch files are read as
    tensors only: no pickled code is run.

    Args:
        config: decides the architecture; weights of another one are refused.
        weights: a hub id (`id` or `id@revision`), a local folder, a file, `dinoseg:NAME` or `random`; the file holds
            either the whole model or exactly the parts left after `cut`.
        cut: removes parts from a model in place.
        local_cls_norm: receives DINOv3's norm for local crops if the file has one; None discards that norm.

    Raises:
        UserError: the weights are not available, cannot be read, or do not fit.
    """
    from transformers import AutoModel

    if weights == "random":
        model = AutoModel.from_config(config, **_drop_pooler(config))
        cut(model)
        return model
    path = expand_path(weights, ".safetensors")
    if path.is_file():
        return _from_file(config, path, cut, local_cls_norm)
    if path.is_dir():
        return _from_folder(weights, path, cut, config)
    return _from_hub(weights, cut, config)


def _from_hub(weights: str, cut: Callable[[Any], None], config: Any) -> nn.Module:
    if not _HUB_ID.fullmatch(weights) or Path(weights).suffix in WEIGHT_SUFFIXES:
        check_exists(weights, "weights", "Check the path.", suffix=".safetensors")
        check_regular(weights)
    name, _, revision = weights.partition("@")
    revision = revision or "main"
    if silent := _why_silent(name, revision):
        return _from_folder(weights, Path(_fetched_before(weights, name, revision, silent)), cut, config)
    model = _from_pretrained(weights, name, cut, config=config, revision=revision)
    folder = _find_cached_folder(name, revision)
    _check_loaded(weights, model, _loaded_files(weights, folder) if folder else ())
    return model


def _why_silent(name: str, revision: str) -> str:
    """Return why the hub does not respond, or "".

    One request suffices, where the loader would retry each file six times.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(name, revision=revision, timeout=10)
    except HfHubHTTPError:  # the hub responds; the loader reports errors about the files
        return ""
    except Exception as error:  # the client's HTTP library raises its own errors
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    _check_no_adapter(f"{name}@{revision}", (file.rfilename for file in info.siblings or ()))
    return ""


def _check_no_adapter(weights: str, names: Iterable[str]) -> None:
    """Refuse files with a peft adapter: transformers would load it, and its base model from any path it names."""
    if _ADAPTER in names:
        raise UserError(f"weights={weights}: holds {_ADAPTER}. Give the full weights, without an adapter.")


def _from_folder(weights: str, folder: Path, cut: Callable[[Any], None], config: Any) -> nn.Module:
    _check_no_adapter(weights, (path.name for path in folder.iterdir()))
    loaded = _loaded_files(weights, folder)  # validates the index before transformers reads it
    model = _from_pretrained(weights, str(folder), cut, config=config)
    _check_loaded(weights, model, loaded)
    return model


def _check_loaded(weights: str, model: nn.Module, loaded: Iterable[Path]) -> None:
    """Refuse a model with non-finite weights, or loaded files that store them in a non-float type."""
    for path in loaded:
        check_weights(outline(path), f"weights={weights}: {path.name}")
    state = model.state_dict()
    check_weights(state, f"weights={weights}", state)


def _loaded_files(weights: str, folder: Path) -> list[Path]:
    """Return the files of a folder that transformers loads: model.safetensors, or those listed in its index.

    Raises:
        UserError: the index is malformed.
    """
    index = folder / _INDEX
    if (folder / "model.safetensors").exists() or not index.exists():
        return [path for path in [folder / "model.safetensors"] if path.exists()]
    try:
        names = forms.read_json(index, _SHARDS)["weight_map"].values()
    except (OSError, forms.SchemaError) as error:
        raise UserError(f"weights={weights}: {_INDEX} cannot be read ({error}). Download it again.") from None
    return [folder / name for name in sorted(set(names))]


def _find_cached_folder(name: str, revision: str) -> Path | None:
    """Return the hub cache folder of the weights, or None if the cache does not hold them under these names."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("model.safetensors", _INDEX):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _fetched_before(weights: str, name: str, revision: str, silent: str) -> str:
    """Return the folder of weights that were downloaded while the hub was reachable."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(name, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        raise UserError(
            f"weights={weights}: not a local folder, the hub is unreachable ({silent}), and the weights were "
            "not downloaded before. Give a downloaded file or folder, weights=PATH; or choose the included backbone, "
            "backbone=tiny_surgical; or start without trained weights, weights=random."
        ) from None


def exported_state(model: Any) -> dict[str, Tensor]:
    """Return a model's weights under the names of the hub's files, which all versions of transformers read.

    DINOv3's rotation frequencies are added if they differ from those of the configuration: Meta's files store them
    rounded.

    Raises:
        UserError: the model has LoRA updates.
    """
    if any(".lora_" in name for name in model.state_dict()):
        raise UserError(
            "This backbone holds LoRA updates, which cannot be exported separately: merge them first, merge=true."
        )
    with tempfile.TemporaryDirectory() as folder, _silence_transformers():
        model.save_pretrained(folder, safe_serialization=True)
        state = {key: value for path in Path(folder).glob("*.safetensors") for key, value in load_file(path).items()}
    rope = getattr(model, "rope_embeddings", None)
    if rope is not None:
        frequencies = rope.inv_freq.detach().float().cpu()
        if not torch.equal(frequencies, type(rope)(model.config).inv_freq):
            state[INV_FREQ] = frequencies.clone()
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or PyTorch file by name; backbones of checkpoints get plain names.

    Raises:
        UserError: the file is broken, or holds anything but tensors.
    """
    content = unwrap(read_tensor_file(path, "weights"))
    other = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if other or not content:
        raise UserError(
            f"weights={path}: holds {', '.join(other[:3]) or 'nothing'}, and no weights by name. Give a file "
            f"of a backbone's weights, or a checkpoint of its pre-training with a `teacher`."
        )
    return content


def _from_file(config: Any, path: Path, cut: Callable[[Any], None], local_cls_norm: nn.Module | None) -> nn.Module:
    from transformers import MODEL_MAPPING

    state = _with_hub_names(read_weights(path), config, path)
    checked = dict(state)
    for name in _INPUT_KERNELS & state.keys():
        config.num_channels = state[name].shape[1]
    frequencies = state.pop(INV_FREQ, None) if config.model_type == "dinov3_vit" else None
    local = {name: state.pop(name) for name in list(state) if name.startswith(LOCAL_CLS_NORM)}
    model: Any = _from_pretrained(
        str(path), None, cut, model_class=MODEL_MAPPING[type(config)], config=config, state_dict=state
    )
    check_weights(checked, f"weights={path}")  # after the loader has checked the names
    if frequencies is not None:
        if frequencies.shape != model.rope_embeddings.inv_freq.shape:  # no other shape depends on the heads
            heads = config.hidden_size // (4 * frequencies.numel())
            raise UserError(
                f"weights={path}: the file belongs to a model with {heads} heads, the backbone has "
                f"{config.num_attention_heads}. Set arch.num_attention_heads={heads}."
            )
        model.rope_embeddings.inv_freq.copy_(frequencies)
    if local_cls_norm is not None and local:
        local_cls_norm.load_state_dict({name.removeprefix(LOCAL_CLS_NORM): value for name, value in local.items()})
    return model


def _with_hub_names(state: dict[str, Tensor], config: Any, path: Path) -> dict[str, Tensor]:
    if is_meta(state):
        return from_meta(state, config, str(path))
    return convnext_names(state) if is_meta_convnext(state) else state


def _from_pretrained(
    weights: str, source: str | None, cut: Callable[[Any], None], *, model_class: Any = None, **options: Any
) -> nn.Module:
    from transformers import AutoModel

    loader: Any = model_class or AutoModel
    # no pickles; mismatches are listed instead of raised, and refused below
    options |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    options |= _drop_pooler(options["config"])
    try:
        with _silence_transformers():
            model, info = loader.from_pretrained(source, dtype=torch.float32, **options)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"weights={weights}: the weights cannot be downloaded ({reason}). If they are gated, accept the "
            "licence on the model's hub page and log in with `hf auth login`; or give a downloaded folder or file: "
            "weights=PATH; for an untrained test: weights=random."
        ) from error
    misfits = [key for kind in ("missing", "unexpected", "mismatched") for key in info.get(f"{kind}_keys", ())]
    pooler = {f"pooler.dense.{part}" for part in ("weight", "bias") if options["config"].model_type == "vit"}
    # DINO files on the hub may have a pooler, which no map depends on
    wrong = {key if isinstance(key, str) else key[0] for key in misfits} - pooler
    whole = model.state_dict().keys()
    cut(model)
    removed = whole - model.state_dict().keys()
    if removed <= set(info.get("missing_keys", ())):  # the file holds a model with the same parts cut
        wrong -= removed
    if wrong:
        raise UserError(
            f"weights={weights}: {len(wrong)} tensors are missing, unexpected or of another shape "
            f"({', '.join(sorted(wrong)[:3])}, ...). Choose the backbone of these weights, or set its arch."
        )
    return model


@contextlib.contextmanager
def _silence_transformers() -> Iterator[None]:
    """Silence transformers' logs and progress bars for reading and writing; download bars still show."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    verbosity, bar, downloads = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if not downloads:
            enable_progress_bars()
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _drop_pooler(config: Any) -> dict[str, Any]:
    return {"add_pooling_layer": False} if config.model_type == "vit" else {}


_RENAMED = (
    (r"downsample_layers\.(\d+)\.(\d+)\.(.+)", r"stages.\1.downsample_layers.\2.\3"),
    (r"stages\.(\d+)\.(\d+)\.dwconv\.(.+)", r"stages.\1.layers.\2.depthwise_conv.\3"),
    (r"stages\.(\d+)\.(\d+)\.norm\.(.+)", r"stages.\1.layers.\2.layer_norm.\3"),
    (r"stages\.(\d+)\.(\d+)\.pwconv([12])\.(.+)", r"stages.\1.layers.\2.pointwise_conv\3.\4"),
    (r"stages\.(\d+)\.(\d+)\.gamma", r"stages.\1.layers.\2.gamma"),
    (r"norm\.(.+)", r"layer_norm.\1"),
)


def is_meta_convnext(state: Mapping[str, Tensor]) -> bool:
    """Return whether the keys are those of Meta's ConvNeXt checkpoint."""
    return "downsample_layers.0.0.weight" in state


def convnext_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of Meta's ConvNeXt checkpoint under the hub's names.

    Meta's file holds the final norm twice, as `norm` and as `norms.3` (the norm of the last of four stages; the
    others have none). The second is left out if it is identical. Unknown keys stay unchanged, so that the loader
    refuses them.
    """
    return {_rename_key(key): value for key, value in state.items() if not _is_copy(key, value, state)}


def _rename_key(key: str) -> str:
    for pattern, name in _RENAMED:
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    return key


def _is_copy(key: str, value: Tensor, state: Mapping[str, Tensor]) -> bool:
    original = state.get(key.replace("norms.3.", "norm.")) if key.startswith("norms.3.") else None
    return original is not None and torch.equal(original, value)

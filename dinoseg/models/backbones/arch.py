"""Validation of `arch` and construction of transformers configurations."""

import re
from collections.abc import Mapping
from typing import Any

from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_value

_AT_LEAST = {  # minimum of a number, or of each number in a list
    **dict.fromkeys(("patch_size", "hidden_size", "num_attention_heads", "num_hidden_layers"), 1),
    **dict.fromkeys(("intermediate_size", "mlp_ratio", "hidden_sizes", "depths"), 1),
    **dict.fromkeys(("num_register_tokens", "initializer_range", "layer_norm_eps"), 0),
}
_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate")


def configuration(model_type: str, values: Mapping[str, Any]) -> Any:
    """Return a valid transformers configuration of a model type.

    Args:
        model_type: name of the model type in transformers.
        values: the values of `arch`, plus `patch_size` for models that have one.

    Raises:
        UserError: unknown key or invalid value; the message names it.
    """
    from transformers import AutoConfig, PretrainedConfig

    # keys common to all transformers models (labels, dtypes, names) do not belong to the architecture
    known = AutoConfig.for_model(model_type).to_dict().keys() - PretrainedConfig().to_dict().keys()
    unknown = sorted(values.keys() - known)
    if unknown:
        raise UserError(f"arch: {model_type} has no {', '.join(unknown)}. Check the key's spelling.")
    try:
        config = AutoConfig.for_model(model_type, **values)
    except Exception as error:  # transformers validates the types and raises its own error classes
        raise _of_another_type(values, error) from error
    _check_ranges(config)
    _check_names(config)
    if model_type == "dinov3_convnext":
        _check_stages(config)
    else:
        _check_heads(config)
        _check_positions(config)
    return config


def _of_another_type(values: Mapping[str, object], error: Exception) -> UserError:
    field = re.search(r"field '(\w+)'", str(error))
    if field is not None and field[1] in values:
        setting = _setting(field[1], values[field[1]])
    else:
        setting = f"arch={format_value(dict(values))}"
    reason = format_value(str(error.__cause__ or error).splitlines()[0], 200)
    return UserError(f"{setting}: {reason}. Correct the value.")


def _check_ranges(config: Any) -> None:
    for key, least in _AT_LEAST.items():
        value = getattr(config, key, least)
        if any(part < least for part in (value if isinstance(value, list | tuple) else [value])):
            raise UserError(f"{_setting(key, value)} is too small. Give at least {least}.")
    for key in _RATES:
        value = getattr(config, key, 0)
        if not 0 <= value < 1:
            raise UserError(f"{_setting(key, value)} is not a probability. Give at least 0 and less than 1.")


def _check_names(config: Any) -> None:
    from transformers.activations import ACT2FN

    if config.hidden_act not in ACT2FN:
        raise UserError(f"{_setting('hidden_act', config.hidden_act)} is unknown. Choose one of {', '.join(ACT2FN)}.")
    if config.num_channels != 3:
        raise UserError(
            f"{_setting('num_channels', config.num_channels)}: images are RGB. Leave it out, or set it to 3."
        )


def _check_stages(config: Any) -> None:
    widths, depths = config.hidden_sizes, config.depths
    if len(widths) != len(depths):
        raise UserError(
            f"{_setting('depths', depths)} has {len(depths)} numbers, {_setting('hidden_sizes', widths)} has "
            f"{len(widths)}. Give one of each for every stage."
        )


def _check_heads(config: Any) -> None:
    heads = config.num_attention_heads
    part = 4 * heads if config.model_type == "dinov3_vit" else heads  # 2D RoPE: channel pairs along two axes
    if config.hidden_size % part:
        raise UserError(
            f"{_setting('num_attention_heads', heads)} with arch.hidden_size={config.hidden_size}: the width "
            f"must be a multiple of {part}. Change one of the two."
        )


def _check_positions(config: Any) -> None:
    if config.model_type != "dinov3_vit" and config.image_size < config.patch_size:  # position grid would be empty
        raise UserError(
            f"{_setting('image_size', config.image_size)}: the learned position embeddings need an image of at least "
            f"one patch. Give at least patch_size={config.patch_size}."
        )


def _setting(key: str, value: object) -> str:
    return f"{'' if key == 'patch_size' else 'arch.'}{key}={format_value(str(value))}"

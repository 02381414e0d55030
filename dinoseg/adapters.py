"""How a backbone is trained: frozen, with LoRA, or whole. The only door to peft."""

from collections.abc import Callable

from torch import nn

from dinoseg.errors import UserError

TARGETS = ("attention", "all_linear")


def frozen(backbone: nn.Module) -> nn.Module:
    """Train nothing of the backbone: it runs in eval mode and builds no graph."""
    return backbone.requires_grad_(False)


def full(backbone: nn.Module) -> nn.Module:
    """Train every weight of the backbone that its features depend on."""
    backbone.requires_grad_(True)
    for name, parameter in backbone.named_parameters():
        if name.endswith("mask_token"):  # only masked pre-training reads it
            parameter.requires_grad_(False)
    return backbone


def lora(backbone: nn.Module, *, rank: int, alpha: int, dropout: float = 0.0, targets: str = "attention") -> nn.Module:
    """Freeze the backbone and add trainable low-rank updates (Hu et al., arXiv 2106.09685).

    Each chosen linear layer W gets W + (alpha / rank) * B A, with A (rank, in) random and B (out, rank) zero.

    Args:
        backbone: changed in place.
        rank: r, at least 1.
        alpha: scale of the update; alpha = rank gives a scale of 1.
        dropout: probability, on the update's input, in [0, 1).
        targets: `attention` (query, key, value and output projections) or `all_linear` (the MLP's too).

    Raises:
        UserError: rank below 1, dropout outside [0, 1), unknown targets, or targets that match nothing.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise UserError(f"adapter.rank={rank}: LoRA needs a rank of at least 1; adapter=frozen trains no adapter.")
    if not 0 <= dropout < 1:
        raise UserError(f"adapter.dropout={dropout}: give a probability of at least 0 and below 1.")
    if targets not in TARGETS:
        raise UserError(f"adapter.targets={targets} is unknown. Choose one of {', '.join(TARGETS)}.")
    names = _linear_layers(backbone, lambda name: targets == "all_linear" or ".attention." in f".{name}.")
    if not names:
        raise UserError(f"adapter.targets={targets} matches no linear layer of this backbone.")
    frozen(backbone)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=names)
    inject_adapter_in_model(config, backbone)
    return backbone


def _linear_layers(module: nn.Module, wanted: Callable[[str], bool]) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear) and wanted(name)]

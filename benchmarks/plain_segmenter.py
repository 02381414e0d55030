"""Train a ViT of timm to segment a folder in plain PyTorch, as one would by hand: references of `peers.py`.

`linear`: BatchNorm and one 1x1 convolution over the last four blocks, all of it trained. `dpt`: the same loop around
segmentation_models_pytorch's DPT on the same ViT as its encoder.
"""

import itertools
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

NORMAL = 0.5  # mean and deviation that the weights were trained with
RATES = {"linear": (1e-4, 1e-3), "dpt": (1e-4, 1e-3)}  # of the encoder, of the rest


class Linear(nn.Module):
    """Score classes on the patches of the last four blocks."""

    def __init__(self, backbone: str, weights: Path, classes: int) -> None:
        super().__init__()
        self.encoder = timm.create_model(backbone, num_classes=0, dynamic_img_size=True)
        self.encoder.load_state_dict(read(weights))
        width = 4 * self.encoder.embed_dim
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1))

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) to (B, K, h, w)
        maps = self.encoder.forward_intermediates(images, indices=4, norm=True, intermediates_only=True)
        return self.head(torch.cat(maps, 1))


def dpt(backbone: str, weights: Path, classes: int) -> nn.Module:
    import segmentation_models_pytorch as smp

    model: nn.Module = smp.DPT(f"tu-{backbone}", encoder_weights=None, classes=classes, dynamic_img_size=True)
    model.encoder.model.load_state_dict(read(weights), strict=False)
    return model


def read(weights: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("head.")}


def one(path: Path, size: tuple[int, int], draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return an image in -1..1 (3, H, W) and its mask, scaled, cropped, padded and mirrored at random."""
    image, mask = Image.open(path).convert("RGB"), Image.open(path.parents[1] / "masks" / f"{path.stem}.png")
    scale = draw.uniform(0.75, 1.5)
    new = (round(image.width * scale), round(image.height * scale))
    pixels = np.asarray(image.resize(new, Image.Resampling.BILINEAR))
    labels = np.asarray(mask.resize(new, Image.Resampling.NEAREST))
    lack = [(0, max(0, want - have)) for want, have in zip(size, labels.shape, strict=True)]
    pixels, labels = np.pad(pixels, (*lack, (0, 0))), np.pad(labels, lack, constant_values=255)
    top, left = (draw.integers(0, have - want + 1) for have, want in zip(labels.shape, size, strict=True))
    pixels, labels = (part[top : top + size[0], left : left + size[1]] for part in (pixels, labels))
    if draw.random() < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    return normal(pixels), torch.from_numpy(labels.copy()).long()


def normal(pixels: np.ndarray) -> Tensor:
    return (torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - NORMAL) / NORMAL


def train(model: nn.Module, kind: str, root: Path, size: tuple[int, int], batch: int, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    files = sorted((root / "images").iterdir())
    inner = {id(parameter) for parameter in model.encoder.parameters()}
    groups = [[p for p in model.parameters() if (id(p) in inner) is own] for own in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in zip(groups, RATES[kind], strict=True)], weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, list(RATES[kind]), total_steps=steps, pct_start=0.1)
    order = itertools.chain.from_iterable(draw.permutation(len(files)) for _ in itertools.count())
    model.train()
    for _ in range(steps):
        drawn = [one(files[index], size, draw) for index in itertools.islice(order, batch)]
        images, masks = (torch.stack(part) for part in zip(*drawn, strict=True))
        logits = F.interpolate(model(images), size, mode="bilinear")
        F.cross_entropy(logits, masks.where(masks < logits.shape[1], 255), ignore_index=255).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def predict(model: nn.Module, path: Path) -> np.ndarray:
    """Return the class ids (H, W) of an image, padded to what DPT halves and doubles."""
    pixels = normal(np.asarray(Image.open(path).convert("RGB")))
    height, width = pixels.shape[1:]
    padded = F.pad(pixels, (0, -width % 32, 0, -height % 32))
    scores = F.interpolate(model.eval()(padded[None]), padded.shape[1:], mode="bilinear")
    return scores[0, :, :height, :width].argmax(0).numpy().astype(np.uint8)

"""Train a linear head on a timm ViT-S/14 in plain PyTorch, as one would by hand: the reference of `end_to_end.py`."""

import argparse
import itertools
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Pairs(Dataset):
    """Images and masks of a folder, cropped and mirrored at random."""

    def __init__(self, root: Path, size: tuple[int, int]) -> None:
        self.images, self.size = sorted((root / "images").iterdir()), size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path, (height, width) = self.images[index], self.size
        image = np.asarray(Image.open(path).convert("RGB"))
        mask = np.asarray(Image.open(path.parents[1] / "masks" / f"{path.stem}.png"))
        top, left = (np.random.randint(0, have - want + 1) for have, want in zip(mask.shape, self.size, strict=True))
        image, mask = (part[top : top + height, left : left + width] for part in (image, mask))
        if np.random.rand() < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        normal = (torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 - 0.45) / 0.225
        return normal, torch.from_numpy(mask.copy()).long()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=(350, 476))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    backbone: nn.Module = timm.create_model("vit_small_patch14_dinov2", img_size=tuple(args.size), num_classes=0)
    backbone.requires_grad_(False)
    if args.lora:
        from peft import LoraConfig, inject_adapter_in_model

        backbone = inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"]), backbone)
    head = nn.Sequential(nn.BatchNorm2d(384), nn.Conv2d(384, 11, 1))
    trained = [part for part in (*backbone.parameters(), *head.parameters()) if part.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    loader = DataLoader(Pairs(args.root, args.size), args.batch, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for image, mask in itertools.islice(batches, args.steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            with nullcontext() if args.lora else torch.no_grad():
                tokens = backbone.forward_features(image)[:, 1:]  # (B, N, C)
            grid = tokens.mT.unflatten(2, (args.size[0] // 14, args.size[1] // 14))
            logits = F.interpolate(head(grid).float(), tuple(args.size), mode="bilinear")
        F.cross_entropy(logits, mask, ignore_index=11).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()

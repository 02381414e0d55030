"""A linear probe in plain PyTorch with the settings of DINOv3's evaluation, without dinoseg, to compare with.

Settings: facebookresearch/dinov3, dinov3/eval/segmentation (linear head, transforms, schedule, sliding windows).

    python benchmarks/linear_probe_reference.py WEIGHTS DATA SET SEED [STEPS CROP BATCH]

SET is camvid or idd_lite; WEIGHTS is a safetensors file of timm's vit_tiny_patch16_224. Prints the mIoU in percent.
"""

import math
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from safetensors.torch import load_file


def pairs(root: Path, name: str, split: str) -> list[tuple[Path, Path]]:
    if name == "camvid":
        images = sorted((root / split / "images").iterdir())
        return [(path, root / split / "masks" / f"{path.stem}.png") for path in images]
    images = sorted((root / "leftImg8bit" / split).rglob("*_image.jpg"))
    masks = (str(path).replace("leftImg8bit", "gtFine").replace("_image.jpg", "_label.png") for path in images)
    return list(zip(images, map(Path, masks), strict=True))


def resized(image: Image.Image, short: int, resample: int) -> Image.Image:
    least, most = min(image.size), max(image.size)
    other = int(short * most / least + 0.5)
    return image.resize((other, short) if image.width >= image.height else (short, other), resample)


def hue_turned(image: np.ndarray, share: float) -> np.ndarray:
    hsv = np.array(Image.fromarray(image).convert("HSV"))
    hsv[..., 0] += np.uint8(int(share * 255) % 256)
    return np.array(Image.fromarray(hsv, "HSV").convert("RGB"))


def recoloured(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    def cut(values):
        return np.clip(values, 0, 255).astype(np.uint8)

    def contrast(image):
        return cut(image * rng.uniform(0.5, 1.5)) if rng.random() < 0.5 else image

    if rng.random() < 0.5:
        image = cut(image + rng.uniform(-32, 32))
    first = rng.random() < 0.5
    image = contrast(image) if first else image
    if rng.random() < 0.5:
        image = np.array(ImageEnhance.Color(Image.fromarray(image)).enhance(rng.uniform(0.5, 1.5)))
    if rng.random() < 0.5:
        image = hue_turned(image, rng.uniform(-0.5, 0.5))
    return image if first else contrast(image)


def view(paths: tuple[Path, Path], crop: int, classes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    image, mask = Image.open(paths[0]).convert("RGB"), Image.open(paths[1])
    short = int(crop * rng.uniform(0.5, 2.0))
    image, mask = resized(image, short, Image.BILINEAR), resized(mask, short, Image.NEAREST)
    pixels, labels = np.array(image), np.array(mask)
    for attempt in range(11):
        top, left = (rng.integers(0, max(side - crop, 0) + 1) for side in labels.shape)
        part = labels[top : top + crop, left : left + crop]
        counts = np.bincount(part[part < classes], minlength=classes)
        if attempt == 10 or (np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < 0.75):
            break
    pixels = pixels[top : top + crop, left : left + crop]
    if rng.random() < 0.5:
        pixels, part = pixels[:, ::-1], part[:, ::-1]
    pixels = (recoloured(np.ascontiguousarray(pixels), rng) / 255 - 0.5) / 0.5
    down, right = crop - part.shape[0], crop - part.shape[1]
    pixels = np.pad(pixels, ((0, down), (0, right), (0, 0)))
    return pixels.transpose(2, 0, 1), np.pad(
        np.where(part < classes, part, 255), ((0, down), (0, right)), constant_values=255
    )


def rate(iteration: int, steps: int, warmup: int) -> float:
    step = max(0, iteration - 1)
    if step < warmup:
        return (1 - (1 - step / warmup) * (1 - 1e-6)) * (1 - step / steps)
    return (1 + math.cos(math.pi * (step + 1) / steps)) / 2


@torch.no_grad()
def evaluate(features, head, test, crop: int, classes: int) -> float:
    stride, confusion = int(crop * 341 / 512), np.zeros((classes, classes), dtype=np.int64)
    for image_path, mask_path in test:
        image, label = Image.open(image_path).convert("RGB"), np.array(Image.open(mask_path))
        pixels = torch.tensor(np.array(resized(image, crop, Image.BILINEAR)) / 127.5 - 1).float().permute(2, 0, 1)[None]
        height, width = pixels.shape[2:]
        total, count = torch.zeros(1, classes, height, width), torch.zeros(1, 1, height, width)
        for i in range(max(height - crop + stride - 1, 0) // stride + 1):
            for j in range(max(width - crop + stride - 1, 0) // stride + 1):
                top, left = min(i * stride, max(height - crop, 0)), min(j * stride, max(width - crop, 0))
                window = pixels[:, :, top : top + crop, left : left + crop]
                total[:, :, top : top + crop, left : left + crop] += F.interpolate(
                    head(features(window)), window.shape[2:], mode="bilinear"
                )
                count[:, :, top : top + crop, left : left + crop] += 1
        found = F.interpolate(total / count, label.shape, mode="bilinear").argmax(1)[0].numpy()
        known = label < classes
        confusion += np.bincount(classes * label[known].astype(int) + found[known], minlength=classes**2).reshape(
            confusion.shape
        )
    with np.errstate(invalid="ignore"):
        return 100 * float(np.nanmean(np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))))


def main(weights: str, root: str, name: str, seed: int, steps: int = 300, crop: int = 224, batch: int = 8) -> float:
    rng, _ = np.random.default_rng(seed), torch.manual_seed(seed)
    classes, validation = (11, "val") if name == "camvid" else (7, "val")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=1000, dynamic_img_size=True)
    model.load_state_dict(load_file(weights))
    model.eval().requires_grad_(False)

    def features(images):
        with torch.no_grad():
            return model.forward_intermediates(images, indices=[-1], norm=True, intermediates_only=True)[0]

    head = torch.nn.Sequential(torch.nn.Dropout2d(0.1), torch.nn.BatchNorm2d(192), torch.nn.Conv2d(192, classes, 1))
    torch.nn.init.normal_(head[2].weight, std=0.01), torch.nn.init.zeros_(head[2].bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-3)
    train, order = pairs(Path(root), name, "train"), []
    for step in range(steps):
        order = order if len(order) >= batch else list(rng.permutation(len(train)))
        chosen, order = order[:batch], order[batch:]
        images, labels = zip(*(view(train[i], crop, classes, rng) for i in chosen), strict=True)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate(step, steps, round(steps * 1500 / 40000))
        targets = torch.tensor(np.stack(labels)).long()
        logits = F.interpolate(head(features(torch.tensor(np.stack(images)).float())), (crop, crop), mode="bilinear")
        loss = F.cross_entropy(logits, targets, ignore_index=255, reduction="sum") / targets.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return evaluate(features, head.eval(), pairs(Path(root), name, validation), crop, classes)


if __name__ == "__main__":
    given = sys.argv[1:]
    print(f"mIoU {main(*given[:3], *map(int, given[3:])):.2f}")

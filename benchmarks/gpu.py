"""Print what an accelerator makes of training steps and of inference, against its own matrix products and usual ways.

`python benchmarks/gpu.py [--backbones vits16 vitb16 vitl16] [--sizes 512 512 544 960] [--batch 8] [--repeats 5]`:
DINOv3 in its published shapes with random weights, a linear head of 26 classes, in bfloat16: images/s of a training
step (frozen, LoRA, full) and of inference (class ids of the images' own size), and the model's floating point
operations a second as a share of what square matrix products of bfloat16 reach here; the same with compiled blocks and
in float32.
Then the most memory of a LoRA step of ViT-L on one image of 544 x 960 and of 1088 x 1920, with and without recomputed
blocks, and time and memory of cross-entropy at full size against `F.interpolate` and `F.cross_entropy`.

Without CUDA it says so and measures nothing; `--tiny` runs all of it on the CPU at sizes that mean nothing, and
`--device cpu --parts speeds --backbones vits16 --sizes 352 480 --batch 1` the same table for a CPU,
in processor seconds.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rows import Row, machine, tell
from tabulate import tabulate
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dinoseg.__main__ import CONFIGS
from dinoseg.config.resolvers import register_resolvers
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.experiment.builder import Builder
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.models.model import SegmentationModel
from dinoseg.training.engine import Engine

CLASSES = 26
WAYS = ("bfloat16", "compiled", "float32")
TASKS = ("inference", "frozen", "lora", "full")
PARTS = ("speeds", "memory", "losses")
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WHY = "no CUDA device is here: run it where there is one, or with --tiny to see that everything runs"
NEEDED = {"usual": 2.0, "compiled": 1.0}  # times as fast as these the loss is to be
Size = tuple[int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=["vits16", "vitb16", "vitl16"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 512, 544, 960], metavar="H W")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, at sizes that mean nothing")
    args = parser.parse_args()
    device = "cpu" if args.tiny else args.device
    if device == "cuda" and not torch.cuda.is_available():
        print(f"Not measured: {WHY}.")
        tell(Row("training and inference on an accelerator", "its matrix products", None, skipped=WHY))
        return
    if args.tiny:
        args.backbones, args.sizes, args.batch, args.repeats = ["vits16"], [32, 48], 2, 1
        args.ways = [way for way in args.ways if way != "compiled"]  # half a minute
    sizes = list(zip(args.sizes[::2], args.sizes[1::2], strict=True))
    peak = matrix_peak(device, 128 if args.tiny else 8192 if device == "cuda" else 1024)
    if "speeds" in args.parts:
        speeds(args, device, sizes, peak)
    if "memory" in args.parts:
        memory(device, args.tiny)
    if "losses" in args.parts:
        losses(device, args.tiny, args.repeats)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"\n{name}, {peak / 1e12:.3g} TFLOP/s of matrix products in bfloat16; {machine()}")


def speeds(args: argparse.Namespace, device: str, sizes: Sequence[Size], peak: float) -> None:
    """Print images/s and shares of the peak, and tell how much faster than in float32 they are."""
    for backbone, size in itertools.product(args.backbones, sizes):
        rows = []
        for task in args.tasks:
            found = {way: speed(args, device, backbone, size, task, way) for way in args.ways}
            where = f"{backbone}, {size[0]} x {size[1]}, {task}"
            rows += [(where, way, rate, 100 * flops * rate / peak, gib) for way, (rate, flops, gib) in found.items()]
            for better, plain in (("bfloat16", "float32"), ("compiled", "bfloat16")):
                if better in found and plain in found:
                    tell(Row(f"{where}, {better}, images/s", plain, found[better][0] / found[plain][0]))
        print(tabulate(rows, ("model", "way", "images/s", "% of peak", "GiB"), floatfmt=".3g"), flush=True)


def speed(
    args: argparse.Namespace, device: str, backbone: str, size: Size, task: str, way: str
) -> tuple[float, float, float]:
    """Return images a second, floating point operations an image, and the most GiB of memory."""
    adapter = "frozen" if task == "inference" else task
    work = Work(device, backbone, adapter, size, args.batch, way, tiny=args.tiny)
    work.model.train(task != "inference")  # not in the measured call: it takes milliseconds
    call = work.predict if task == "inference" else work.step
    with FlopCounterMode(display=False) as counter:
        call()
    seconds, peaked = measured(call, device, args.repeats)
    return args.batch / seconds, counter.get_total_flops() / args.batch, peaked


class Work:
    """A model, a batch of noise and what is done with them."""

    def __init__(
        self, device: str, backbone: str, adapter: str, size: Size, batch: int, way: str, *, tiny: bool, more: str = ""
    ) -> None:
        words = [f"backbone=dinov3_{backbone}", "backbone.weights=random", f"adapter={adapter}", "head=linear"]
        words += ["data.root=none", f"data.classes=[{','.join(f'c{n}' for n in range(CLASSES))}]", "loss.weights=none"]
        words += [f"resolution.crop=[{size[0]},{size[1]}]", "optim.optimizer.lr=1e-4", *more.split()]
        register_resolvers()
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            cfg = OmegaConf.create(OmegaConf.to_container(compose("main", words)))
        if tiny:
            cfg.backbone.arch.update(TINY)
        precision = "fp32" if way == "float32" else "bf16"
        self.engine = Engine(device, precision, workers=0, compile=way == "compiled")
        torch.manual_seed(0)
        self.model: SegmentationModel = self.engine.place(Builder(cfg).model())
        self.loss = Builder(cfg).unweighted_loss().to(self.engine.device)
        self.optimizer = Builder(cfg).optimizer(self.model)
        images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
        masks = torch.randint(0, CLASSES, (batch, *size), dtype=torch.uint8)
        self.batch = Batch(images, masks, [str(number) for number in range(batch)]).to(self.engine.device)
        self.net = self.engine.prepare(self.model)
        self.model.train()

    def step(self) -> None:
        """Train one step, as `training/trainer.py` does."""
        prediction = self.net(self.batch.image)
        value, parts = self.loss(prediction, self.batch)
        weight = parts.get("weight", torch.full_like(value, self.batch.count))
        self.engine.backward(value * weight)
        total, count = self.engine.total(value.detach() * weight, weight)
        self.engine.optimizer_step(self.optimizer, total, count, clip=1.0)

    @torch.inference_mode()
    def predict(self) -> None:
        """Find the class of each pixel."""
        with self.engine.autocast():
            prediction = self.model(self.batch.image)
        prediction.class_ids()


def memory(device: str, tiny: bool) -> None:
    """Print the most memory of a LoRA step of ViT-L on one image."""
    rows = []
    for size in [(32, 48)] if tiny else [(544, 960), (1088, 1920)]:
        found = []
        for recomputed in (False, True):
            more = f"backbone.checkpointing={str(recomputed).lower()}"
            try:
                work = Work(device, "vitl16", "lora", size, 1, "bfloat16", tiny=tiny, more=more)
                found.append(measured(work.step, device, 2)[1])
            except torch.OutOfMemoryError:
                found.append(float("nan"))
            work = None  # type: ignore[assignment]
        rows.append((f"vitl16, lora, one image of {size[0]} x {size[1]}", *found))
        if not tiny and found[1] > 0:
            tell(Row(f"{rows[-1][0]}, recomputed blocks, memory", "kept activations", found[0] / found[1]))
    print("\n" + tabulate(rows, ("step", "GiB", "GiB, blocks recomputed"), floatfmt=".3g"))


def losses(device: str, tiny: bool, repeats: int) -> None:
    """Print time and memory of the loss and its gradient, and tell the ratios to the usual path."""
    rows = []
    grid, size = ((4, 6), (32, 48)) if tiny else ((68, 120), (1088, 1920))
    for classes in (CLASSES, 150):
        scores = torch.randn(2, classes, *grid, device=device, requires_grad=True)
        mask = torch.randint(0, classes, (2, *size), dtype=torch.uint8, device=device)
        mask[:, :, : size[1] // 10] = 255
        criterion = CrossEntropy(torch.ones(classes)).to(device)

        def ours(scores: Tensor = scores, mask: Tensor = mask, criterion: CrossEntropy = criterion) -> Tensor:
            asked = Prediction(scores, size, (1.0, 1.0), lambda *_: scores, grid=scores)
            return criterion(asked, Batch(mask, mask, ["0", "1"]))[0]

        def usual(scores: Tensor = scores, mask: Tensor = mask) -> Tensor:
            return F.cross_entropy(F.interpolate(scores, size, mode="bilinear"), mask.long(), ignore_index=255)

        ways = (
            {"usual": usual, "ours": ours} if tiny else {"usual": usual, "compiled": torch.compile(usual), "ours": ours}
        )
        values = {name: way().item() for name, way in ways.items()}
        assert abs(values["ours"] - values["usual"]) <= 1e-4 * abs(values["usual"]), values
        found = {name: measured(lambda way=way: way().backward(), device, repeats) for name, way in ways.items()}
        rows += [(classes, name, 1e3 * seconds, gib) for name, (seconds, gib) in found.items()]
        for name in ways.keys() - {"ours"}:
            ratio = found[name][0] / found["ours"][0]
            tell(Row(f"loss at {size[0]} x {size[1]}, {classes} classes, time", name, ratio, NEEDED[name]))
    print("\n" + tabulate(rows, ("classes", "loss", "ms", "GiB"), floatfmt=".3g"))


def measured(call: Callable[[], object], device: str, repeats: int) -> tuple[float, float]:
    """Return the least seconds of a call after two, and the most GiB of device memory that they take; 0 on a CPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, clock = [], time.perf_counter if device == "cuda" else time.process_time  # a CPU is shared with others
    for _ in range(2 + repeats):
        wait(device)
        start = clock()
        call()
        wait(device)
        seconds.append(clock() - start)
    return min(seconds[2:]), torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


def matrix_peak(device: str, side: int) -> float:
    """Return the floating point operations a second of square matrix products in bfloat16."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / measured(lambda: left @ right, device, 10)[0]


def wait(device: str) -> None:
    """Return when the device has done all that it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

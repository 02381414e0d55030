"""The segmentation model of the Python API: a `torch.nn.Module` that also predicts, saves and describes itself."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, Self, overload
from zlib import crc32

import torch
from torch import Tensor, nn

from dinoseg.checkpoints.resume import standalone_config
from dinoseg.checkpoints.trained import restore
from dinoseg.config.plain import to_container
from dinoseg.core.contracts import Backbone, GuardedModule, Head, require_classes
from dinoseg.core.shapes import Prediction
from dinoseg.experiment.models import ModelBuilder
from dinoseg.experiment.objects import OPTION, lend_objects
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.strategy import InferenceStrategy
from dinoseg.inference.trained_sizes import TrainedSizes, limit_to_trained_size
from dinoseg.models import adapters
from dinoseg.models.model import SegmentationModel, non_persistent_buffers, quantised_names, stateless_modules
from dinoseg.segmenter.facts import ModelFacts
from dinoseg.segmenter.inputs import check_levels
from dinoseg.segmenter.model import Model
from dinoseg.segmenter.runtime import MODEL_FILE, Options
from dinoseg.segmenter.torch_runtime import TorchRuntime, preserve_global_state, replicate_in_eval_mode
from dinoseg.training.checkpoint import describe, find
from dinoseg.training.loading import frozen_fingerprint
from dinoseg.utils.devices import choose_device
from dinoseg.utils.errors import UserError, file_errors_as_user_errors
from dinoseg.utils.files import Stamp, stamp
from dinoseg.utils.precision import compute_dtype
from dinoseg.utils.wording import count_of, format_text

_HELD = (None, "random")  # config values for weights that the checkpoint itself holds
_GROUP = ("params", "lr", "weight_decay")  # of a parameter group, for any optimizer


class Segmenter(GuardedModule, Model):
    """A segmentation model: backbone, adapter and head, with classes and preprocessing.

    `dinoseg.create_model` and `dinoseg.load` return it. Called with images, it returns class logits with gradients, so
    it trains in any PyTorch loop, under DDP and with `torch.compile`. Images are normalised inside.
    Frozen modules stay in eval mode in `train()`.

    Args:
        model: backbone and head.
        facts: classes, palette, sizes, scores and sources.
        config: the whole config as plain values.
        info: description of the checkpoint that it was loaded from; empty for a new model.
        strategy: inference strategy of `predict`.
        precision: precision of `predict`: auto, bf16, fp16 or fp32. `forward` computes as the surrounding autocast.
        file: the file that it was loaded from, if that is a one-file model.
        checkpoint: the file of any kind that it was loaded from, with its stamp before it was read.

    Attributes:
        facts: classes, palette, sizes, scores and sources.
        file: as the argument.

    Examples:
        >>> import dinoseg, torch
        >>> model = dinoseg.create_model("rgb", classes=["ground", "leaf"])
        >>> model(torch.zeros(1, 3, 32, 48, dtype=torch.uint8)).shape
        torch.Size([1, 2, 32, 48])
    """

    def __init__(
        self,
        model: SegmentationModel,
        facts: ModelFacts,
        config: Mapping[str, Any],
        *,
        info: Mapping[str, Any],
        strategy: InferenceStrategy,
        precision: str = "auto",
        file: Path | None = None,
        checkpoint: tuple[Path, Stamp | None] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.facts = facts
        self.file = None if file is None else file.absolute()
        self._config, self._info = config, info
        self._strategy, self._precision = strategy, precision
        self._checkpoint = checkpoint
        self._has_checked_levels = False
        self._scored = self._checksums()  # the weights that the scores in `facts` belong to

    if TYPE_CHECKING:  # nn.Module's own, which is untyped

        @overload
        def __call__(self, images: Tensor, *, as_prediction: Literal[False] = False) -> Tensor: ...

        @overload
        def __call__(self, images: Tensor, *, as_prediction: Literal[True]) -> Prediction: ...

        def __call__(self, images: Tensor, *, as_prediction: bool = False) -> Tensor | Prediction:
            """Run `forward`."""
            ...

    def forward(self, images: Tensor, *, as_prediction: bool = False) -> Tensor | Prediction:
        """Return contiguous class logits (B, K, H, W) at the size of the images, with gradients.

        The softmax over K is the class probability. Heads of queries return the logarithm of their probabilities.

        Args:
            images: (B, 3, H, W) RGB, or with the model's channels, of any size: uint8, uint16 or float in 0..1.
            as_prediction: return the head's outputs as a `Prediction`, which losses of `dinoseg.losses` take instead
                of logits: `mask_classification_loss` needs it, others save the memory of logits at full size.

        Raises:
            UserError: the images have another shape, type or range.
        """
        self._check_images(images)
        prediction = self.model(images)
        return prediction if as_prediction else prediction.logits().contiguous()

    def logits(self, images: Tensor) -> Tensor:
        """Return class logits (B, K, H, W) of images (B, 3, H, W), as a call of the model does."""
        return self(images)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the backbone's feature maps (B, C, h, w), one for each block that the head reads.

        h and w are the height and width at the backbone's resolution divided by its patch size, rounded up.

        Args:
            images: (B, 3, H, W) RGB of any size, uint8 or float in 0..1.

        Raises:
            UserError: the images have another shape, type or range.
        """
        self._check_images(images)
        return self.model.backbone.maps(self.model.pixels(images))

    @property
    def backbone(self) -> Backbone:
        """The backbone with its adapter."""
        return self.model.backbone

    @property
    def head(self) -> Head:
        """The head."""
        return self.model.head

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return self.backbone.mean.device

    @property
    def runtime(self) -> TorchRuntime:
        """Inference with this model on the device that it is on, in eval mode; the model's own mode does not change."""
        device = self.device
        dtype = compute_dtype(self._precision, device)
        context = nullcontext if dtype == torch.float32 else partial(torch.autocast, device.type, dtype)
        return TorchRuntime(Predictor(replicate_in_eval_mode(self.model), device, context, self._strategy))

    def trainable_parameters(self) -> list[dict[str, Any]]:
        """Return parameter groups for any torch optimizer, with the learning rates and weight decay of the config.

        The head is trained at `head.lr`, the adapted backbone at `adapter.lr`. Biases, norms and embeddings have no
        weight decay. Other values of the optimizer, such as AdamW's `betas`, are the caller's, and so is the schedule.

        Returns:
            Groups with `params`, `lr` and `weight_decay`, in which each trainable parameter occurs once.

        Raises:
            UserError: nothing is trainable, or a parameter was added outside the parts.
        """
        from dinoseg.experiment.builder import Builder  # imports the training loop

        self._refuse_additions()
        with preserve_global_state():
            optimizer = Builder.of(self._config).optimizer(self.model)
        return [{key: group[key] for key in _GROUP} for group in optimizer.param_groups]

    def save(self, path: str | PathLike[str], *, delta: bool = False, gated: bool = False) -> None:
        """Write the model as one safetensors file, from which `dinoseg.load` returns an equal one.

        The file holds weights, config, classes and preprocessing. It includes the scores of an evaluation only if the
        weights are those that were scored.

        Args:
            path: of the file; an older one is replaced, whole or not at all.
            delta: write only the trained weights; the file names the source of the backbone's.
            gated: write weights whose licence restricts redistribution; do not share the file except on its terms.

        Raises:
            UserError: if the file cannot be written, or the licence of the weights needs `gated` or `delta`.
        """
        self._write(Path(path).expanduser(), delta=delta, gated=gated)

    def save_pretrained(self, folder: str | PathLike[str], *, delta: bool = False, gated: bool = False) -> None:
        """Write model.safetensors and a model card to a folder, for `from_pretrained`; arguments as of `save`.

        Raises:
            UserError: as `save`.
        """
        from dinoseg.segmenter.hub import write_card

        target = Path(folder).expanduser()
        facts = self._write(target / MODEL_FILE, delta=delta, gated=gated)
        write_card(facts, target.absolute().name, target)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        delta: bool = False,
        gated: bool = False,
    ) -> str:
        """Upload the model and a model card to a hub repository; return the commit's address.

        Args:
            repo_id: `ORG/NAME`, created if missing.
            private: visibility of a new repository; None: the organisation's default.
            revision: the branch to write to; None: main.
            token: of the hub, never stored; None: the one that `hf auth login` has stored.
            delta: as of `save`.
            gated: upload weights whose licence restricts redistribution; you must follow its terms.

        Raises:
            UserError: as `save`, or if the hub refuses the upload.
        """
        from dinoseg.segmenter.hub import push

        with TemporaryDirectory() as name:
            folder = Path(name)
            facts = self._write(folder / MODEL_FILE, delta=delta, gated=gated)
            return push(folder, facts, repo_id, private=private, revision=revision, token=token, gated=gated)

    def save_adapter(self, folder: str | PathLike[str]) -> None:
        """Write the LoRA updates and the head to a folder of peft.

        `peft.PeftModel.from_pretrained(base, folder)` reads it. `base` is a model of `create_model` with
        `adapter="frozen"`, and the backbone, its weights, the head and the number of classes of this model.

        Args:
            folder: receives adapter_config.json and adapter_model.safetensors.

        Raises:
            UserError: the model has no LoRA layers, or trains other weights of the backbone, or peft has merged or
                switched off some layers, or the folder cannot be written.
        """
        adapters.check_lora(self.model)
        adapters.check_active(self.model)
        target = Path(folder).expanduser()
        with file_errors_as_user_errors(target.parent):
            target.mkdir(parents=True, exist_ok=True)
            adapters.write_adapter(self.model, target, "model.")

    def merge(self) -> Self:
        """Add the LoRA updates to the weights of the backbone, remove the LoRA layers, and return the model.

        It predicts the same up to rounding, in less time. The adapter is `frozen` from then on, and files hold the
        whole backbone, even with `delta`. Backbones in 4 or 8 bits or in bfloat16 become float32. Create optimizers,
        and DDP and compiled models, after this call.

        Raises:
            UserError: the model has no LoRA layers, or peft has merged or switched off some.
        """
        from dinoseg.checkpoints.source import ModelSource  # imports the training loop
        from dinoseg.segmenter.write import source_of

        adapters.check_lora(self.model)
        adapters.check_active(self.model)
        with preserve_global_state():
            source = ModelSource.of(self._config)
            model = source.in_float32(self.model).to(self.device)
            model.limit = self.model.limit
            origin = self.facts.backbone or source_of(source.config, frozen_fingerprint(self.model)["backbone"])
            adapters.merge(model.backbone).weights = "random"  # no file has these weights, so that checkpoints do
            bits = source.settings("adapter").get("bits") or self.facts.dequantised
            changes = {"adapter": "frozen", "backbone.weights": "random"}
            if "dtype" in source.config["backbone"]:
                changes["backbone.dtype"] = "float32"
            self._config = source.with_options(changes).config
        self.facts = replace(self.facts, backbone=origin, dequantised=bits)
        self.model = model.train(self.training)
        return self

    def extra_repr(self) -> str:
        """Return the options, classes and numbers of parameters on one line."""
        choices = self._config["choices"] | {group: type(part).__name__ for group, part in self._objects.items()}
        parts = ", ".join([str(choices["backbone"]), *(f"{group}={choices[group]}" for group in ("adapter", "head"))])
        names = ", ".join(format_text(name) for name in self.classes[:5]) + (", ..." if self.num_classes > 5 else "")
        kinds = count_of(self.num_classes, "class", "classes")
        total = sum(each.numel() for each in self.parameters())
        trained = sum(each.numel() for each in self.parameters() if each.requires_grad)
        return f"{parts}; {kinds}: {names}; {total:,} parameters, {trained:,} trainable"

    def __repr__(self) -> str:
        return f"dinoseg.Segmenter({self.extra_repr()})"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move the parameters, but refuse another floating-point type, as `half()` and `double()` set it."""
        if (dtype := fn(torch.empty(0, dtype=torch.float32)).dtype) != torch.float32:
            raise UserError(
                f"A Segmenter holds its weights in float32, not {dtype}. Use torch.autocast in a loop, or "
                'dinoseg.load(PATH, precision="bf16") to predict.'
            )
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Self:
        """Switch mode; frozen modules stay in eval mode."""
        super().train(mode)
        return self

    @contextmanager
    def as_file(self) -> Iterator[Path]:
        """Yield a file or run folder with this model, which modes read.

        It is a temporary file if the weights in memory have changed, or the file that they came from. The temporary
        file has no folder of data: give it to the mode, as in `dinoseg.evaluate(model, data={"root": "FOLDER"})`.

        Raises:
            UserError: as `save`.
        """
        if self._has_its_checkpoint() and self.source is not None and self._checksums() == self._scored:
            yield self.source
            return
        with TemporaryDirectory() as folder, lend_objects(self._copy_objects()):
            file = Path(folder) / MODEL_FILE
            self._write(file, delta=False, gated=True)  # the copy does not leave this machine
            yield file

    @property
    def _objects(self) -> dict[str, nn.Module]:
        """The parts that were given as objects, which no file can name."""
        parts: dict[str, nn.Module] = {"backbone": self.backbone, "head": self.head}
        return {group: part for group, part in parts.items() if self._config["choices"][group] == OPTION}

    def _copy_objects(self) -> dict[str, nn.Module]:
        """Return copies of the objects, for a mode that builds the model again and loads the file's weights."""
        objects = self._objects
        if "backbone" in objects and (adapters.has_lora(self.model) or quantised_names(self.model)):
            raise UserError(
                "The backbone is an object with LoRA layers or quantised weights, which a mode would add again. Call "
                "model.merge() first."
            )
        return {group: copy.deepcopy(part) for group, part in objects.items()}

    def _refuse_additions(self) -> None:
        """Refuse parameters and buffers that were added to the model: the optimizer and a file would omit them."""
        added = [name for name in self.state_dict() if not name.startswith("model.")]
        if added:
            raise UserError(
                f"{added[0]} was added to the model, whose parameter groups and file hold its own parts only. Make it "
                "an attribute of another module, which holds this model, too."
            )

    def _write(self, path: Path, *, delta: bool, gated: bool) -> ModelFacts:
        """Write the model's file and return the facts in it."""
        from dinoseg.checkpoints.source import ModelSource  # imports the training loop
        from dinoseg.segmenter.write import complete_facts, with_evidence, write_model

        self._refuse_additions()
        with preserve_global_state(), file_errors_as_user_errors(path.parent):
            source = ModelSource.of(self._config)
            facts = self.facts
            info = dict(self._info)
            info.setdefault("frozen", frozen_fingerprint(self.model))
            if self._has_its_checkpoint() and "facts" not in info:  # of a run folder
                facts = with_evidence(facts, source)
            if self._checksums() != self._scored:
                facts = replace(facts, scores=None)
            facts = complete_facts(facts, source, self.model, info, TrainedSizes.from_info(info), delta=delta)
            info.pop("format", None)
            write_model(path, source, self.model, facts, info, delta=delta, gated=gated, where="The model")
        return facts

    def _has_its_checkpoint(self) -> bool:
        """Return whether the file that it was loaded from is unchanged, and still the one that `source` stands for."""
        if self._checkpoint is None or self.source is None:
            return False
        file, before = self._checkpoint
        return before is not None and stamp(file) == before and find(self.source, "best").absolute() == file

    def _checksums(self) -> dict[str, int | str]:
        """Return a CRC-32 of each parameter and buffer but quantised ones, which vary by device (0.3 s per GB).

        Modules without either are their class.
        """
        skipped = quantised_names(self.model)
        state = self.model.state_dict() | non_persistent_buffers(self.model)
        sums = {
            name: crc32(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
            for name, value in state.items()
            if name not in skipped
        }
        return {**sums, **stateless_modules(self.model)}

    def _check_images(self, images: Tensor) -> None:
        """Refuse all but tensors (B, C, H, W) of uint8, uint16 or floats in 0..1, with at least one pixel.

        Levels on an accelerator are read from the first batch only, since that waits for it; compiled calls read none.
        """
        channels = self.backbone.channels
        if images.ndim != 4 or images.shape[1] != channels or not images.numel():
            raise UserError(f"Images have the shape {list(images.shape)}. Give (B, {channels}, H, W), B at least 1.")
        if images.dtype in (torch.uint8, torch.uint16):
            return
        if not images.is_floating_point():
            raise UserError(f"Images are {images.dtype}. Give uint8, or floats in 0..1, or uint16.")
        is_known = self._has_checked_levels and images.device.type != "cpu"
        if not (is_known or images.is_meta or torch.compiler.is_compiling()):
            least, most = images.detach().aminmax()
            check_levels(float(least), float(most), "The batch of images")
            self._has_checked_levels = True


def load_torch(path: Path, options: Options, *, key: str = "resume") -> Segmenter:
    """Load the model of an existing file, checkpoint or run folder, in eval mode.

    Raises:
        UserError: in the terms of a command line with the file as `key`.
    """
    device = choose_device(options.device)
    compute_dtype(options.precision, device)  # refuse a wrong precision before weights are read
    file = find(path, "best", key=key)
    origin = (file.absolute(), stamp(file))  # before it is read
    own = None if options.config_dir is None else Path(options.config_dir).expanduser().absolute()
    if own is not None and not own.is_dir():
        raise UserError(f"config_dir={options.config_dir} is not a folder. Give the folder of your config groups.")
    with preserve_global_state():
        info = describe(file, key=key)
        facts = ModelFacts.of(info, str(file))
        changes = {"engine.device": options.device, **_weights(file, info, options)}
        trust, use = options.trust, options.inference
        cfg = standalone_config(file, info, changes, inference=use, trust=trust, config_dir=own, key=key)
        sizes = TrainedSizes.from_info(info)
        builder = ModelBuilder(cfg)
        strategy = builder.strategy(facts.classes)
        model = restore(builder, file, key=key)[0].to(device)
        facts = replace(facts, pixels=builder.pixels.as_dict())
    require_classes(model.head, str(file))
    limit_to_trained_size(model, sizes)
    is_whole = "facts" in info
    loaded = Segmenter(
        model,
        facts,
        to_container(cfg),
        info=info,
        strategy=strategy,
        precision=cfg.engine.precision if options.precision == "auto" else options.precision,
        file=file if is_whole else None,
        checkpoint=origin,
    )
    return loaded.eval()


def _weights(file: Path, info: Mapping[str, Any], options: Options) -> dict[str, str]:
    """Return config overrides for weights that are given instead of those that the file names.

    Raises:
        UserError: if the file names none, since it holds them.
    """
    changes = {}
    for part, path in (("backbone", options.backbone), ("head", options.head)):
        if path is None:
            continue
        if info["config"][part].get("weights") in _HELD:
            raise UserError(f"{part}.weights={path}: {file} holds its own {part}. Leave it out.")
        changes[f"{part}.weights"] = str(path)
    return changes

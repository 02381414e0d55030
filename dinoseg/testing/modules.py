"""Rules that backbones and heads share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinoseg.utils.wording import join_names

IMAGE_SIZE = (37, 50)  # no multiple of any usual patch size


def require(condition: bool, message: str) -> None:
    """Raise an AssertionError with the message if a contract is broken."""
    if not condition:
        raise AssertionError(message)


def check_class(part: nn.Module, base: type[nn.Module]) -> None:
    """Check the class, whose defaults callers rely on."""
    require(
        isinstance(part, base),
        f"{type(part).__name__}: it must inherit {base.__module__}.{base.__name__}, but it does not; derive the class "
        "from it.",
    )


def check_unchanged(name: str, run: Callable[[list[Tensor]], object], given: Sequence[Tensor]) -> None:
    """Check that a part leaves its input as it was: others read it too, such as the feature cache."""
    copies = [part.clone() for part in given]
    run(copies)
    require(
        all(map(torch.equal, copies, given)),
        f"{name}: it must not change its input, but the input changed; use no operations in place on it.",
    )


@contextmanager
def fixed_seed(seed: int = 0) -> Iterator[None]:
    """Seed the random numbers of the CPU, and restore their state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def autocast() -> Iterator[None]:
    """Run in bfloat16 without oneDNN, whose convolution reads memory beyond small maps on CPUs with AMX."""
    flags: Any = torch.backends.mkldnn  # its context manager warns about Intel GPUs
    enabled = flags.enabled
    flags.enabled = False
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        flags.enabled = enabled


def random_images(count: int, size: tuple[int, int] = IMAGE_SIZE) -> Tensor:
    """Return images (B, 3, H, W) of noise in 0..1."""
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(3))


def are_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-4) -> bool:
    """Return whether tensors differ by at most a share `tolerance` of their largest value."""
    return len(found) == len(expected) and all(
        ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * (1 + theirs.abs().max()))
        for ours, theirs in zip(found, expected, strict=True)
    )


@dataclass(frozen=True)
class ModuleCase:
    """A backbone or head under test.

    Args:
        make: returns a new part with other random weights at each call.
        run: returns the part's results (B, ...) for images (B, 3, H, W), the same in each mode.
        run_training: returns everything that a loss may use of them.
        batch_size: images of a training pass.
        unused: names of the parameters that the results do not depend on.
    """

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor], list[Tensor]]
    run_training: Callable[[nn.Module, Tensor], list[Tensor]]
    batch_size: int = 2
    unused: Sequence[str] = ()

    def gradients(self) -> dict[str, Tensor | None]:
        """Return the gradient of each trained parameter of a new part after a training pass."""
        part = self.make().train()
        results = self.run_training(part, random_images(self.batch_size))
        total = torch.stack([result.float().square().mean() for result in results]).sum()
        if total.requires_grad:
            total.backward()
        return {name: weight.grad for name, weight in part.named_parameters() if weight.requires_grad}


def check_modes(case: ModuleCase) -> None:
    """Check that `train` and `eval` reach all modules."""
    part = case.make()
    for training in (True, False):
        part.train(training)
        others = [name or "itself" for name, module in part.named_modules() if module.training != training]
        require(
            not others,
            f"{type(part).__name__}: after train({training}) all modules must have training={training}, but "
            f"{join_names(others)} did not change; call super().train(mode) in its `train`.",
        )


def check_determinism(case: ModuleCase) -> None:
    """Check that two passes in eval mode are equal."""
    part, images = case.make().eval(), random_images(2)
    require(
        all(map(torch.equal, case.run(part, images), case.run(part, images))),
        f"{type(part).__name__}: two passes over the same images must be equal in eval mode, but they differ; draw "
        "random numbers only if `self.training`.",
    )


def check_independent_images(case: ModuleCase) -> None:
    """Check that the results of an image do not depend on the others of its batch."""
    part, images = case.make().eval(), random_images(3)
    together = [result[1:2] for result in case.run(part, images)]
    require(
        are_close(together, case.run(part, images[1:2])),
        f"{type(part).__name__}: in eval mode an image must give the same results alone and in a batch, but they "
        "differ; compute no statistics over dimension 0.",
    )


def check_state_dict(case: ModuleCase) -> None:
    """Check that the state dict of a trained part restores its results in a new one."""
    source, other, images = case.make(), case.make(), random_images(2)
    case.run_training(source.train(), random_images(case.batch_size))  # running statistics change
    try:
        other.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise AssertionError(
            f"{type(source).__name__}: its state dict must load into a new instance, but load_state_dict failed; "
            f"create all parameters in `__init__`. {error}"
        ) from error
    require(
        are_close(case.run(other.eval(), images), case.run(source.eval(), images)),
        f"{type(source).__name__}: a new instance with the same state dict must give the same results, but they "
        "differ; register tensors with `register_buffer` or as `nn.Parameter`.",
    )


def check_copy(case: ModuleCase) -> None:
    """Check that a deep copy has weights of its own, as the moving average of the weights needs it."""
    part, other, images = case.make(), case.make().eval(), random_images(2)
    copied = deepcopy(part).eval()
    copied.load_state_dict(other.state_dict())
    require(
        are_close(case.run(copied, images), case.run(other, images)),
        f"{type(part).__name__}: a deep copy must use its own weights, but it uses those of the original; keep no "
        "function that refers to `self`, such as a lambda.",
    )


def check_gradients(case: ModuleCase) -> None:
    """Check that a backward pass reaches all trained parameters, and these only."""
    name, found = type(case.make()).__name__, case.gradients()
    missing = [key for key, gradient in found.items() if gradient is None and key not in case.unused]
    require(
        not missing,
        f"{name}: the results must depend on all trained parameters, but {join_names(missing)} got no gradient; use "
        "them in `forward`, remove them, or set requires_grad=False.",
    )
    reached = [key for key, gradient in found.items() if gradient is not None and key in case.unused]
    require(
        not reached,
        f"{name}: parameters in `unused` must get no gradient, but {join_names(reached)} did; remove them from "
        "`unused`.",
    )
    _check_finite(name, found, "float32")


def check_autocast(case: ModuleCase) -> None:
    """Check that results and gradients in bfloat16 are finite and near those in float32."""
    part, images = case.make().eval(), random_images(2)
    expected = case.run(part, images)
    with autocast():
        found = [result.float() for result in case.run(part, images)]
        gradients = case.gradients()
    require(
        are_close(found, expected, tolerance=0.2),
        f"{type(part).__name__}: results under torch.autocast in bfloat16 must be finite and near those in float32, "
        "but they are not; compute sums, exponentials and norms in float32.",
    )
    _check_finite(type(part).__name__, gradients, "bfloat16")


def _check_finite(name: str, gradients: dict[str, Tensor | None], precision: str) -> None:
    broken = [key for key, gradient in gradients.items() if gradient is not None and not gradient.isfinite().all()]
    require(
        not broken,
        f"{name}: gradients must be finite in {precision}, but those of {join_names(broken)} are not; avoid divisions "
        "by zero and logarithms of zero.",
    )


MODULE_RULES = (
    check_modes,
    check_determinism,
    check_independent_images,
    check_state_dict,
    check_copy,
    check_gradients,
    check_autocast,
)

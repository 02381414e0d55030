import logging
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from making import Pictures
from small_trainings import SHORT, segmenter, train_model

from dinoseg.core.shapes import Batch
from dinoseg.data.transforms import Augment
from dinoseg.extensions.clips.view import ClipBatch
from dinoseg.inference.memory import OutOfMemory
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.overlap import Dice
from dinoseg.models.heads.mlp import MlpHead
from dinoseg.training.engine import Engine
from dinoseg.training.image_data_module import ImageDataModule
from dinoseg.training.micro_batches import MicroBatches
from dinoseg.training.step import BatchLoss, StepOutput

MLP = partial(MlpHead, 24, 1, 3, 8)
TWO = Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), ["a", "b"])


class Noise(Pictures):
    """Images of noise, labelled by chance; of some only a few pixels are labelled, or none."""

    def __init__(self):
        super().__init__([(17, 23)] * 7)

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["mask"][torch.from_numpy(np.random.default_rng(index).random((17, 23)) < index / 6)] = 255
        return sample


class Small(CrossEntropy):
    """A machine that holds `most` images, and fails in the forward pass, or in the backward pass behind the head."""

    def __init__(self, most, late, each_alike):
        super().__init__(torch.tensor([1.0, 0.3, 2.0]))
        self.most, self.late, self.each_alike, self.seen = most, late, each_alike, []

    def forward(self, prediction, batch):
        self.seen.append(list(batch.names))
        value, parts = super().forward(prediction, batch)
        if self.each_alike:
            value = prediction.grid.square().mean()
            parts = {}
        if len(batch.names) <= self.most or not torch.is_grad_enabled():
            return value, parts
        if not self.late:
            raise RuntimeError(SHORT)
        value.register_hook(lambda gradient: self._fail() if self.late == 1 else gradient)
        prediction.grid.register_hook(lambda gradient: self._fail())
        return value, parts

    def _fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines")


@pytest.fixture
def train(tmp_path):
    """Train; return the gradients of the last step, the log, the loss and the model."""

    def run(most=99, late=0, head=MLP, batch_size=5, each_alike=False, **options):
        model = segmenter(head)
        gradients = {}

        class Noting(Engine):
            def optimizer_step(self, optimizer, total, weight, **given):
                gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
                return super().optimizer_step(optimizer, total, weight, **given)

        data_module = ImageDataModule(Noise(), Noise(), Augment((16, 16)), batch_size=batch_size, seed=0, workers=0)
        parts = {"engine": Noting("cpu", "fp32", workers=0), "loss": Small(most, late, each_alike), "lr": 1e-3}
        settings = {"steps": 1, "val_every": 9, "accumulate": 2, **options}
        done = train_model(model, data_module, tmp_path, **parts, **settings)
        done.gradients = gradients
        return done

    return run


def distance(first, second):
    """Return the largest difference of gradients, relative to the largest of all."""
    assert first.keys() == second.keys()
    scale = max(value.abs().max() for value in first.values())
    return max((first[name] - second[name]).abs().max() for name in first) / scale


@pytest.mark.heavy
@pytest.mark.parametrize(("most", "late"), [(3, 0), (2, 1), (1, 2)], ids=["forward", "loss", "backward"])
def test_a_step_is_over_the_same_images_in_parts_that_fit(train, most, late, caplog):
    whole, parted = train(), train(most, late)
    assert distance(whole.gradients, parted.gradients) < 1e-6
    taken = parted.loss.seen[-len(Noise()) :]  # of the validation
    step = [names for names in parted.loss.seen[: -len(taken)] if len(names) <= most]
    assert [name for names in step[-{3: 4, 2: 8, 1: 10}[most] :] for name in names] == sum(whole.loss.seen[:2], [])
    for key in ("train/loss", "train/gradient_norm", "train/miou", "train/accuracy"):
        assert parted.rows[0][key] == pytest.approx(whole.rows[0][key], rel=1e-5), key
    said = caplog.messages[0]
    assert "a batch of 5 samples" in caplog.text and "into 2 micro-batches" in caplog.text and "\n" not in said


def test_later_steps_reuse_the_found_split(train, caplog):
    whole, parted = train(steps=2), train(2, steps=2)
    assert distance(whole.gradients, parted.gradients) < 1e-4  # Adam divides by small numbers
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 2
    assert [len(names) for names in parted.loss.seen if len(names) > 2] == [5, 3]


def test_single_sample_out_of_memory_ends_with_a_remedy(train):
    with pytest.raises(OutOfMemory, match=r"a batch of 1 sample \(\[enforce fail.*backbone.checkpointing=true"):
        train(0)


def test_split_batches_preserve_the_minimum_size_of_the_head(train):
    class Two(MlpHead):
        min_batch_size = 2

    train(2, head=partial(Two, 24, 1, 3, 8), batch_size=4)
    with pytest.raises(OutOfMemory, match="on a batch of 3 samples"):
        train(2, head=partial(Two, 24, 1, 3, 8), batch_size=5)


def test_running_means_are_those_of_the_completed_step(train):
    short = train(4, late=2, accumulate=1, head=None).model.head.state_dict()
    name = next(name for name in short if name.endswith("num_batches_tracked"))
    assert short[name] == 2


def micro_batches(loss=None, undo=lambda: None, world_size=1):
    """Return the micro-batches of steps of one batch."""
    engine = SimpleNamespace(world_size=world_size, device=torch.device("cpu"))
    return MicroBatches(engine, loss or CrossEntropy(torch.ones(2)), 1, 1, undo=undo)


def run(micro, work, batch):
    """Call `work` with each micro-batch of a step of one batch; return the output of the step."""
    output = StepOutput(torch.device("cpu"), None)
    for part in micro.split_step(iter([batch]), output):
        with micro.retry_batch():
            work(part)
            output.add(BatchLoss(torch.ones(()), torch.ones(()), {}), None, part)
    return output


def only_one_sample(batch):
    """Run out of memory for more than one sample."""
    if len(batch.names) > 1:
        raise MemoryError


def test_other_errors_pass_and_several_ranks_get_a_remedy():
    def fail(error):
        def work(_):
            raise error

        return work

    micro = micro_batches(world_size=2)
    batch = ClipBatch(torch.zeros(4, 2, 3, 8, 8), list("abcd"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(micro, fail(RuntimeError("size mismatch")), batch)
    with pytest.raises(OutOfMemory, match="Set a smaller data.batch_size with more trainer.accumulate"):
        run(micro, fail(MemoryError()), batch)


def test_a_batch_that_does_not_fit_on_the_device_is_halved(train, monkeypatch):
    copy = Batch.to
    monkeypatch.setattr(Batch, "to", lambda batch, device: only_one_sample(batch) or copy(batch, device))
    whole = train(batch_size=1)
    assert distance(whole.gradients, train(batch_size=2, accumulate=1).gradients) < 1e-6


def test_random_draws_are_those_of_a_step_that_began_in_parts():
    drawn, undone = [], []
    micro = micro_batches(undo=lambda: undone.append(len(drawn)))

    def work(batch):
        drawn.append(torch.rand(3))
        only_one_sample(batch)

    torch.manual_seed(7)
    output = run(micro, work, TWO)
    assert (output.images, micro.num_batches) == (2, 2)
    torch.manual_seed(7)
    assert torch.equal(drawn[1], torch.rand(3)) and undone == [1]


@pytest.mark.parametrize("sums", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_split_warning_names_affected_statistics(sums, caplog):
    run(micro_batches(loss=Dice(torch.ones(2)) if sums else None), only_one_sample, TWO)
    assert ("the loss its sums" in caplog.text) == sums
    assert "BatchNorm computes its statistics per micro-batch" in caplog.text


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_batches_split_in_order_and_evenly(parts):
    batch = Batch(torch.arange(15).view(5, 3, 1, 1), torch.arange(5).view(5, 1, 1), list("abcde"))
    clips = ClipBatch(torch.arange(30).view(5, 2, 3, 1, 1), list("abcde"))
    for whole in (batch, clips):
        split = whole.split(parts)
        assert torch.equal(torch.cat([part.image for part in split]), whole.image)
        assert sum([part.names for part in split], []) == whole.names
        sizes = [len(part.image) for part in split]
        assert len(split) == parts and max(sizes) - min(sizes) <= 1 and sizes == [len(part.names) for part in split]
    assert torch.equal(torch.cat([part.mask for part in batch.split(parts)]), batch.mask)


def test_a_loss_without_weights_counts_each_sample_alike(train):
    whole, parted = train(accumulate=1, each_alike=True), train(3, accumulate=1, each_alike=True)
    assert distance(whole.gradients, parted.gradients) < 1e-6


def test_restarted_step_counts_nothing_of_before():
    output = StepOutput(torch.device("cpu"), None)
    output.add(BatchLoss(torch.tensor(2.0), torch.tensor(1.0), {}), None, SimpleNamespace(names=["a"], count=1))
    output.restart()
    assert (output.total, output.weight, output.names, output.images) == (0, 0, [], 0)

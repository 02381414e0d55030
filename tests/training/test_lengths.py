import pytest
from command_line import SMALL, call, write_data
from mistakes import refusals
from omegaconf import OmegaConf

from dinoseg.experiment.builder import Builder, in_steps
from dinoseg.training import checkpoint

GIVEN = {"batch_size": 4, "accumulate": 2, "steps": 70, "epochs": None, "val_every": 5}


@pytest.mark.parametrize(
    ("given", "steps", "val_every"),
    [
        ({}, 70, 5),
        ({"epochs": 3}, 38, 5),  # 12.5 steps an epoch: rounded once, not three times
        ({"epochs": 3, "steps": None}, 38, 5),
        ({"epochs": 0.5}, 6, 5),
        ({"epochs": 0.01}, 1, 5),
        ({"epochs": 2, "accumulate": 1}, 50, 5),
        ({"val_every": None}, 70, 12),
        ({"val_every": None, "batch_size": 100}, 70, 1),
    ],
)
def test_lengths_in_steps(given, steps, val_every):
    assert in_steps(100, **GIVEN | given) == (steps, val_every)


def lengths(**given):
    trainer = GIVEN | given
    cfg = OmegaConf.create({"data": {"batch_size": trainer.pop("batch_size")}, "trainer": trainer})
    return Builder(cfg).loop_settings(100)


WHOLE = "is out of range. Give a whole number of at least 1"
test_invalid_length_is_refused = refusals(
    {
        "no epoch": (lambda: lengths(epochs=0), "trainer.epochs=0 is out of range. Give a number above 0, or null"),
        "no length": (lambda: lengths(steps=None), "Neither trainer.steps nor trainer.epochs is set"),
        "no batch": (lambda: lengths(accumulate=0), f"trainer.accumulate=0 {WHOLE}"),
        "no validation": (lambda: lengths(val_every=0), f"trainer.val_every=0 {WHOLE}, or null"),
        "empty batches": (lambda: lengths(batch_size=0), f"data.batch_size=0 {WHOLE}"),
    }
)


@pytest.mark.heavy
def test_length_in_epochs_is_converted_and_changed_on_resume(tmp_path):
    write_data(tmp_path / "data")  # 4 images in batches of 2
    small = [override for override in SMALL if not override.startswith("trainer.steps")]

    def train(*arguments):
        done = call(tmp_path, "mode=train", *small, "trainer.val_every=null", *arguments)
        path = next(iter(sorted(tmp_path.glob("outputs/base/train_*/checkpoints/last.safetensors"))), None)
        return done, path and checkpoint.describe(path)

    refused = train("trainer.epochs=1", "trainer.steps=1")[0]
    assert refused.status == 1 and "trainer.steps and trainer.epochs both set the length of the training" in refused.err
    done, found = train("trainer.epochs=1.5", "optim.schedule.warmup=40")
    assert done.status == 0, done.err
    assert found["progress"]["step"] == 3 and found["config"]["trainer"]["epochs"] == 1.5
    (run,) = tmp_path.glob("outputs/base/train_*")
    assert "The learning rate rises for 40 steps of a training of 3" in (run / "run.log").read_text()
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert sum("val/miou" in row for row in rows) == 2  # after an epoch, and at the end
    done, found = train(f"resume={run}", "trainer.steps=4")  # its own 1.5 epochs would be over
    assert done.status == 0, done.err
    assert found["progress"]["step"] == 4 and found["config"]["trainer"]["epochs"] is None
    done, found = train(f"resume={run}", "trainer.epochs=2.5")
    assert found["progress"]["step"] == 5 and found["config"]["trainer"]["epochs"] == 2.5

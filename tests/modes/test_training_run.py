"""What a run is computed by: its checkpoints say it, and who goes on otherwise is told."""

import logging
from types import SimpleNamespace

import pytest
from mistakes import assert_refused
from omegaconf import OmegaConf

from dinoseg.experiment.builder import Builder
from dinoseg.modes import training_run
from dinoseg.modes.training_run import TrainingRun
from dinoseg.report.log import RunLog, read_rows

KEPT = {"engine.cache": "disk", "features.dtype": "float16"}


@pytest.fixture
def note_settings(caplog):
    """Return a function that notes what a job is computed by after its checkpoint's, and gives it and what is told."""

    def note(before, precision="fp32", kept=KEPT, **options):
        job = object.__new__(TrainingRun)
        job.build, job.engine = Builder(OmegaConf.create({"resume": "run"})), SimpleNamespace(precision=precision)
        job.start = before and SimpleNamespace(info=before)
        checkpoints = SimpleNamespace(info={})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            job.note(checkpoints, kept, **options)
        return checkpoints.info, caplog.messages

    return note


def test_changed_settings_are_reported_once_on_resume(note_settings):
    first, told = note_settings(None)
    assert first == {"engine": {"engine.precision": "fp32", **KEPT}} and not told
    assert note_settings(first)[1] == [] == note_settings({})[1] == note_settings(first, "bf16", tells=False)[1]
    assert note_settings(first, kept={**KEPT, "engine.cache": "memory"})[1] == []  # the same numbers
    (told,) = note_settings(first, "bf16")[1]
    assert "engine.precision was fp32 and is bf16. Set the earlier" in told and "features" not in told
    then, (told,) = note_settings(first, "bf16", kept={})
    assert "; features.dtype was float16 and is null. Set the earlier" in told
    assert then["engine"]["engine.cache"] == "off" and "was null and is float16" in note_settings(then)[1][0]
    whole = {**KEPT, "features.dtype": "float32"}
    assert note_settings({"engine": KEPT | {"features.dtype": None}}, kept=whole)[1] == []
    assert note_settings({"engine": KEPT | {"teacher": "a"}})[1] == []  # no student
    assert "teacher was a and is b" in note_settings({"engine": {"teacher": "a"}}, kept={**KEPT, "teacher": "b"})[1][0]


@pytest.mark.parametrize("said", [3, ["bf16"], {"engine.precision": 16}, None])
def test_invalid_settings_in_a_checkpoint_are_refused(note_settings, said):
    words = ("resume=run: its engine is ", "; its values must be text. Choose another")
    assert_refused(lambda: note_settings({"engine": said}), *words)


def test_log_of_a_resumed_run_continues_at_its_step(compose, tmp_path):
    with RunLog(tmp_path) as log:
        for step in (2, 4):
            log.scalars(step, {"train/loss": 1.0})
            log.scalars(step, {"val/miou": 0.5})
    build = Builder(compose("mode=train", "logger=[]", "data.root=none", "data.classes=[a,b]"))
    start = SimpleNamespace(info={"progress": {"step": 2, "validation_pending": True}})
    training_run.RunContext(build, tmp_path, None, SimpleNamespace(is_main=True), start).open_log().close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 2, "train/loss": 1.0}]


def test_end_of_a_run_is_logged_before_the_log_closes(tmp_path, monkeypatch):
    calls = []
    log = SimpleNamespace(scores=calls.append, checkpoint=calls.append, close=lambda: calls.append("close"), views=[])
    monkeypatch.setattr(training_run.checkpoint, "describe", lambda path: {"progress": {"step": 3}})
    checkpoints, task = SimpleNamespace(best=tmp_path / "best.safetensors"), SimpleNamespace(skipped={})
    training_run.RunContext(None, tmp_path, task, None).finish_log(log, {"miou": 0.5}, checkpoints)
    assert calls == [{"miou": 0.5}, checkpoints.best, "close"]

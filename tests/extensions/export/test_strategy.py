"""Exported graphs warn of the inference strategy that they lack; files that store it apply it without a warning."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import call, write_data
from making import save
from portable_parts import PROGRESS, untrained_config

from dinoseg.checkpoints.source import ModelSource
from dinoseg.core.sizes import backbone_size
from dinoseg.extensions.export.export import prepare_model
from dinoseg.extensions.export.options import GraphOptions
from dinoseg.extensions.export.strategy import Strategy, missing_strategy, warn_of_strategy
from dinoseg.inference.windows import Windows

WINDOWS = ("inference=windows", "inference.size=[16,24]")


@pytest.fixture
def find_missing(compose, tmp_path):
    """Return a function that returns the strategy that a graph of a model with some overrides lacks."""

    def find(*words, sizes=((32, 48),), **info):
        cfg = untrained_config(compose, tmp_path, *words, **info)
        return missing_strategy(ModelSource(cfg).load_on_cpu(), sizes)

    return find


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("inference=windows", "resolution.crop=[16,24]"), "inference=windows inference.size=[16,24]"),
        (
            (*WINDOWS, "inference.multiple=32", "inference.shortest=64", "inference.scales=[0.5,1]"),
            "inference=windows inference.size=[16,24] inference.scales=[0.5,1] inference.shortest=64 "
            "inference.multiple=32",
        ),
        (("inference=whole", "inference.flips=horizontal"), "inference=whole inference.flips=horizontal"),
        (
            ("inference=whole", "inference.min_region=9", "inference.largest_component=[dark]"),
            "inference=whole inference.min_region=9 inference.largest_component=[dark]",
        ),
        (("inference.scales=[0.5,1.0]",), "inference=auto inference.size=[518,518] inference.scales=[0.5,1.0]"),
    ],
)
def test_strategy_missing_in_the_graph_is_named_with_its_values(find_missing, words, named):
    found = find_missing(*words)
    assert " ".join(found.words) == named and found.miou == PROGRESS["best"]


@pytest.mark.parametrize("words", [(), ("inference=whole",)])
def test_whole_image_strategy_is_not_missing_in_a_graph(find_missing, words):
    assert find_missing(*words) is None


def test_windows_are_compared_with_each_size(find_missing):
    words = ("inference=windows", "inference.size=[32,48]")
    assert find_missing(*words, sizes=[(8, 9), (32, 48)]) is None
    assert find_missing(*words, sizes=[(8, 9), (32, 49)]) is not None
    sizes = {"typical": 32, "largest": 40}  # `whole` reduces images larger than all of the training, windows do not
    model = SimpleNamespace(longest=None, scale=1.0, reduced_size=lambda size: backbone_size(size, 1.0, 32))
    assert not Windows(64).equals_single_pass(model, (sizes["largest"] + 1, 8), None)
    model.longest = 32
    assert Windows(64).equals_single_pass(model, (41, 8), None) and Windows(32).equals_single_pass(model, (41, 8), None)
    assert Windows(64, shortest=6).equals_single_pass(model, (6, 32), None)
    assert not Windows(64, shortest=7).equals_single_pass(model, (6, 32), None)
    assert not Windows(31).equals_single_pass(model, (41, 8), None)
    model.scale = 0.5  # windows are resized twice
    assert not Windows(64).equals_single_pass(model, (41, 8), None)


def test_all_images_of_the_verification_are_considered(compose, tmp_path):
    cfg = untrained_config(compose, tmp_path, "inference=windows", "inference.size=[32,48]")
    for width, is_whole in ((48, True), (56, False)):
        for number, size in enumerate([(8, 8), (32, width)]):
            save(tmp_path / f"images/{number}.png", np.zeros((*size, 3), np.uint8))
        with prepare_model(ModelSource(cfg), tmp_path, GraphOptions(images=str(tmp_path / "images"))) as ready:
            assert (ready.strategy is None) == is_whole


def test_only_scores_of_the_exported_step_are_stated(find_missing):
    assert find_missing(*WINDOWS, "trainer.score=dice").miou is None
    assert find_missing(*WINDOWS, "trainer.score=miou", facts={}).miou is None  # a file, whose strategy may be another
    assert find_missing(*WINDOWS, "trainer.score=miou", progress=PROGRESS | {"step": 4}).miou is None


def test_the_warning_states_scores_and_remedy(caplog):
    report = {"has_masks": True, "pictures": 2, "miou": {"torch": 0.88, "exported": 0.8825}}
    warn_of_strategy(Strategy(["inference=windows", "inference.size=16"], 0.998), "model.onnx", report)
    warn_of_strategy(Strategy(["inference=x"], None), "model.pt2", report | {"has_masks": False})
    both, neither = caplog.messages
    assert both == (
        "mode=eval and mode=predict use inference=windows inference.size=16 for this model. model.onnx does not apply "
        "this: it predicts each image in one pass. With its strategy the model scored mIoU 99.80. On the 2 images of "
        "the verification, the file scored mIoU 88.25. Apply the strategy in the program that calls the file. For "
        "scores that compare with those of the file, add inference=whole inference.flips=none inference.scales=[1.0] "
        "inference.min_region=0 inference.largest_component=[] to mode=eval."
    )
    assert "model.pt2 does not apply this" in neither and "mIoU" not in neither


@pytest.mark.heavy
def test_exporting_a_windowed_run_warns_once_with_both_scores(compose, tmp_path):
    write_data(tmp_path / "data")
    words = ("inference=windows", "inference.size=[8,8]", "inference.shortest=64")
    untrained_config(compose, tmp_path, *words)
    given = ["resume=run", "engine=cpu", "data.root=data"]
    done = call(tmp_path, "mode=export", "export=program", *given, "hydra.run.dir=out")
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "out/export_report.json").read_text())
    assert report["images"] == ["0", "1"] and report["missing_strategy"] == {"words": [*words], "miou": 0.5}
    (message,) = re.findall(r"mode=eval and mode=predict use .*", done.err)
    assert f"{' '.join(words)} for this model. model." in message
    assert "the model scored mIoU 50.00. On the 2 images of the verification" in message
    single_pass = message.split(" add ")[1].removesuffix(" to mode=eval.").split()
    scored = call(tmp_path, "mode=eval", *given, "hydra.run.dir=e", *single_pass)
    assert scored.status == 0, scored.err
    of_file = float(re.search(r"the file scored mIoU (\d+\.\d+)", message)[1])
    of_mode_eval = json.loads((tmp_path / "e/scores.json").read_text())["miou"]
    assert of_file == pytest.approx(100 * of_mode_eval, abs=GraphOptions.max_miou_drop)

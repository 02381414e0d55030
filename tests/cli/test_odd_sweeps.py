"""Words that end before a job begins: each in one message, and flags wherever they stand."""

import pytest
from command_line import call

from dinoseg.cli.typos import check_words
from dinoseg.config.composition import SHIPPED


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("-m", "hparam=glob(nothing*)"), "error: hparam=glob(nothing*) is unknown. Choose from ade20k_m2f, "),
        (("-m", "head=glob(/etc/*)"), "error: head=glob(/etc/*) is unknown. Choose from cnn, "),
        (("-m", "head=glob(m*)", "head.nonsense=1"), "error: head.nonsense is not a key of the config."),
        (("hparam=base", "-m", "head=1,2"), "error: head=1 is unknown. Choose from cnn, "),
        (
            ("~hydra.run.dir",),
            "error: ~hydra.run.dir leaves hydra.run.dir without a valid value. Leave it out.",
        ),
        (("hydra.sweep.dir={}",), "error: hydra.sweep.dir={} leaves hydra.sweep.dir without a valid value."),
        (("data=\u202etxt",), "error: data=\\u202etxt is unknown. Choose from "),
        (("-m", "head=[1],[2]"), "error: head=[1],[2] is a list, and head takes one option. Choose one of cnn, "),
        (("-m", "mode=train", "metric=[nsd],[nsdd]"), "error: metric=nsdd is unknown. Did you mean metric=nsd?"),
        (
            ("-m", "mode=train", "metric=[nsd],[]", "head.nonsense=1"),
            "error: head.nonsense is not a key of the config.",
        ),
        (
            ("-m", "mode=train", "metric=[nsd],[]", "metric.nsd.tolerance=3"),
            "error: metric.nsd.tolerance is not a key of all",
        ),
        (("-m", "mode=train", "metric=nsdd,[]"), "error: metric=nsdd is unknown. Did you mean metric=nsd?"),
        (("mode=train", "metric.nsd.size=1"), "error: metric.nsd.size is not a key of the config."),
        (("~hparam",), "error: ~hparam removes a key that is read. Leave it out"),
    ],
)
def test_unknown_option_is_one_message(tmp_path, words, says):
    done = call(tmp_path, "mode=summary", *words)
    assert done.status == 1 and done.err.count("\n") == 1 and done.err.startswith(says), done.err


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("metric.nsd.tolerance=1",), "nsd"),
        (("metric=[cldice]", "metric.nsd.tolerance=1"), "nsd"),
        (("logger.wandb.project=x",), "wandb"),
        (("logger=[]", "logger.tensorboard._partial_=x"), "tensorboard"),
    ],
)
def test_key_of_an_option_that_is_not_listed_names_it(tmp_path, words, option):
    found, group = call(tmp_path, "mode=train", *words).err, words[-1].partition(".")[0]
    assert found.startswith(
        f"error: {words[-1]}: no chosen option has this key. Options that have it: {group}={option}."
    )
    assert f"such as {group}=[{option}]" in found


@pytest.mark.parametrize("word", ["metric=[nsd],[boundary_iou,cldice]", "logger=[],[tensorboard]", "metric=nsd,[]"])
def test_lists_of_options_can_be_swept(word):
    check_words(["-m", "mode=train", word], [SHIPPED])


@pytest.mark.parametrize("last", ["seed=3,4", "++seed=3,4", "seed=5"])
def test_a_key_that_is_swept_twice_is_refused(tmp_path, last):  # Hydra runs only the last values
    done = call(tmp_path, "-m", "mode=summary", "seed=1,2", last)
    assert done.status == 1 and done.err.startswith(f"error: seed=1,2 and {last} set the same key"), done.err
    assert not list(tmp_path.iterdir())


def test_flags_may_stand_between_words(tmp_path):
    done = call(tmp_path, "mode=summary", "--cfg", "job", "--package", "data", "data.batch_size=3")
    assert done.status == 0 and "batch_size: 3\n" in done.out, done.err

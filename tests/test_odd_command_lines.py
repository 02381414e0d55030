"""Odd command lines end rightly, or with one message: a few here, many with tests/fuzz_command_lines.py."""

import pytest
from command_line import write_data
from fuzz_command_lines import BASES, fault, lines

pytestmark = pytest.mark.slow  # composes many command lines

QUICK = ("summary", "score", "help", "prepare", "export")  # which need no trained run, or refuse without one at once


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    write_data(root / "here/data")
    return root


@pytest.mark.heavy
def test_random_command_lines_have_no_fault(root):
    drawn = [words for words in lines(120, seed=1, modes=QUICK) if "mode=glob(*)" not in words]
    assert len(drawn) >= 30 and len(set(drawn)) == len(drawn)
    wrong = {words: what for words in drawn if (what := fault(root, words))}
    assert not wrong


IMPOSSIBLE = (  # after mode=summary
    *("+slots=[[1]]", "adapter=null", "seed=${nothing}", "~seed", "~head", "head._partial_=x"),
    *("head._target_=x", "++resolution.longest.extra=[1,2]", "++seed.extra=x", "cache_dir=[a,b]", "cache_dir=null"),
    *(f"seed={'9' * 5000}", "data.reader.masks.colors={_target_: os.getcwd}"),
    "head.layers=[{a: {_target_: os.getcwd}}]",
    *("++mode.resume_from.extra=true", "mode.outputs={}", f"slots={'n' * 5000}", f"++resume={'n' * 5000}"),
    *("resolution=240", "data.classes=5", "+head.num_classes.x=1", "head.layers=${oc.env:NOTHING}"),
    *("resolution.crop=[1,1]", "resolution.scale=nan", "data.classes=[]", "backbone.arch=3"),
)
FOLDERS = ("data.root=[]", "data.root={}", "data.prepare.root=3", "data.root=~nobody_here/x")


@pytest.mark.parametrize(
    "words",
    [
        *(("mode=summary", *BASES["summary"], word) for word in IMPOSSIBLE),
        *(("mode=prepare", *BASES["prepare"], word) for word in FOLDERS),
        ("mode=summary", "features.gib={a: 1}", "~mode", "mode=-"),  # removes a group, and chooses it
    ],
    ids=lambda words: words[-1],
)
def test_impossible_value_is_one_message(root, words):
    assert not fault(root, words)

"""A regular expression of a config ends, whatever it says."""

import pytest

from dinoseg.data.splits import regex_group
from dinoseg.models.adapters import Lora
from dinoseg.utils import bounded_regex
from dinoseg.utils.bounded_regex import Pattern
from dinoseg.utils.errors import UserError


def test_endless_pattern_is_stopped(monkeypatch):
    text = "^(a|aa)+$"
    monkeypatch.setattr(bounded_regex, "_SECONDS", 0.05)
    with pytest.raises(UserError, match="takes more than 0.05 s on the name aaa"):
        Pattern(text, "data.group").search("a" * 60 + "!")
    with pytest.raises(UserError, match=r"^group=.* takes more than"):
        regex_group(text)("a" * 60 + "!")
    with pytest.raises(UserError, match=r"^targets=.* takes more than"):
        Lora(rank=1, alpha=1, targets=text).pattern.search("a" * 60 + "!")


@pytest.mark.parametrize("text", ["(", "[", "(" * 500, "a{2,1}", "*"])
def test_invalid_pattern_is_refused(text):
    with pytest.raises(UserError, match="adapter.targets=.* is not a regular expression"):
        Pattern(text, "adapter.targets")
    with pytest.raises(UserError, match="1001 characters"):
        Pattern("a" * 1001, "adapter.targets")


def test_valid_pattern_is_searched():
    found = Pattern(r"^(video_[^_/]+)", "data.group").search("video_11_2/3")
    assert found.group(1) == "video_11" and Pattern("x", "data.group").search("y") is None

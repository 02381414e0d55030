import pytest

from dinoseg.experiment.unread import warn_unread


@pytest.mark.parametrize(
    ("words", "unread", "named"),
    [
        (["mode=track", "slots=lock_on", "tracker.short_side=4"], ["slots"], "slots=lock_on"),
        (["slots.match=auto", "slots.extra_slots=0"], ["slots"], "slots.match=auto, slots.extra_slots=0"),
        (["+slots.match=auto", "tracker.dtype=x"], ["tracker.dtype", "slots"], "+slots.match=auto, tracker.dtype=x"),
        (["tracker=crw", "tracker.context=3"], ["tracker.short_side", "tracker.first"], None),
        (["slotsize=3", "head.slots=2", "tracker.shorter=1"], ["slots", "tracker.short_side"], None),
        ([], ["slots"], None),
    ],
)  # fmt: skip
def test_overrides_without_effect_are_named(tmp_path, caplog, words, unread, named):
    (tmp_path / "config").mkdir()
    (tmp_path / "config/overrides.txt").write_text("\n".join(words) + "\n")
    warn_unread(tmp_path, unread, "Because.")
    assert [record.getMessage() for record in caplog.records] == (
        [f"No effect here: {named}. Because."] if named else []
    )


def test_a_folder_without_command_line_is_no_mistake(tmp_path, caplog):
    warn_unread(tmp_path, ["slots"], "Because.")
    assert not caplog.records

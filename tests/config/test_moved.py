"""Each part that a config of before named, and that has moved since, is found under its name of today."""

import pytest
from hydra.utils import get_object

from dinoseg.config.moved import renamed, today

BEFORE = """
data.clip_davis.Davis data.clip_folder.VideoFolder data.clip_movi.Movi data.clip_pairs.foreground
data.clip_pairs.no_masks data.clip_view.ClipView data.clip_youtube_vos.YoutubeVos data.clips.Cut data.clips.open_clips
data.folder.Layout data.folder.folder_dataset data.frequencies.class_counts data.idd.idd data.masks.Masks
data.prepare_idd.prepare data.prepare_sarrarp.prepare data.sarrarp.sar_rarp50
data.synthetic.moving_write.render_moving_objects data.synthetic.write.render_dataset heads.multiscale.multiscale_head
inference.slot_settings.SlotTracking inference.tracking_settings.Settings modes.sweep.SweepTable
"""


@pytest.mark.parametrize("name", BEFORE.split())
def test_a_part_that_has_moved_is_found(name):
    target = f"dinoseg.{name}"
    assert today(target) != target and today(today(target)) == today(target)
    assert callable(get_object(today(target)))


def test_parts_in_lists_are_renamed_and_what_is_no_name_is_left_to_those_who_refuse_it():
    older = {"losses": [{"_target_": "dinoseg.data.idd.idd", "name": "dinoseg.data.idd.idd"}, {"_target_": ["x"]}, 3]}
    newer = {"_target_": "dinoseg.data.formats.idd.idd", "name": "dinoseg.data.idd.idd"}
    assert renamed(older) == {"losses": [newer, {"_target_": ["x"]}, 3]}

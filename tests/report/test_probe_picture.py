"""The picture of a probe, as the reader sees it."""

import pytest

from dinoseg.modes.probe import probe_picture


@pytest.mark.parametrize("alone", [4, 12])
def test_names_of_blocks_stay_off_the_edge(alone):
    names = [*map(str, range(alone)), "2+5+8+11"]
    rows = [{"blocks": name, "val_miou": 0.5, "held_out_miou": None} for name in names]
    picture = probe_picture(rows, names[-1])
    edge = 8  # pixels
    assert (picture[:, -edge:] == 255).all() and (picture[:, :edge] == 255).all() and (picture[-edge:] == 255).all()

"""Batches of images without masks beside those with: how many, and by which chance."""

from types import SimpleNamespace

import pytest

from dinoseg.data.train_views import UNLABELLED, VIEW, make_rng
from dinoseg.training.mixed_data_module import Unlabelled, _read
from dinoseg.utils.errors import UserError


def test_a_batch_is_one_that_there_is_and_that_ranks_can_share():
    assert Unlabelled().size(4, 4, 2) == 4 and Unlabelled(batch_size=6).size(4, 9, 3) == 6
    for size, there, world_size in ((4, 3, 1), (4, 9, 3)):
        with pytest.raises(
            UserError, match=rf"trainer.unlabelled_batch_size={size} with {there} images.*{world_size} dev"
        ):
            Unlabelled().size(size, there, world_size)


def test_views_are_drawn_by_a_chance_that_no_others_have():
    images = SimpleNamespace(read=lambda index, chance: (index, chance.random()))
    drawn = _read(images, 5, 2, 3)
    assert drawn == (3, make_rng(5, 2, 3, UNLABELLED).random()) and drawn[1] != make_rng(5, 2, 3, VIEW).random()

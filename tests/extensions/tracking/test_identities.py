"""IDs of objects that a model finds in each frame: what is matched, what gets a new ID, and what ends."""

import numpy as np
import pytest
import torch
from drawn_videos import SIZE, Colours, KnownObjects, Rectangle, draw_scene, make_model
from mistakes import assert_refused
from plain_identities import PlainTracks, pairings

from dinoseg.core.objects import Objects
from dinoseg.extensions.protocols.davis import Davis2017Unsupervised
from dinoseg.extensions.query_heads.eomt import EomtHead
from dinoseg.extensions.rendering.moving.write import draw_video
from dinoseg.extensions.tracking.grid.assignment import match_objects
from dinoseg.extensions.tracking.grid.settings import MatchSettings
from dinoseg.extensions.tracking.identities import ObjectTracker, separate_objects
from dinoseg.metrics.region_boundary import match_proposals, pair_scores
from dinoseg.models.model import SegmentationModel

NEAR = MatchSettings(context=4, radius=4)


def follow(scene, batch=3, settings=NEAR, **options):
    """Return the masks and the tracker of a scene of (frames, objects of each)."""
    frames, objects = scene
    tracker = ObjectTracker(make_model(objects), settings, **options)
    masks = []
    for start in range(0, len(frames), batch):
        masks += tracker.track(frames[start : start + batch], [None] * len(frames[start : start + batch]))
    return np.stack(masks), tracker


def ids_of(masks, objects, name):
    """Return the ID in the middle of an object's pixels in each frame; None where it has not been found."""
    seen = []
    for mask, found in zip(masks, objects, strict=True):
        places = [place for place, each in enumerate(found.names) if each == name]
        seen.append(int(np.median(mask[found.masks[places[0]].to_mask(found.size)])) if places else None)
    return seen


def assert_one_id(masks, objects, *names):
    """Check that each object has one ID of its own in all frames."""
    ids = [{each for each in ids_of(masks, objects, name) if each is not None} for name in names]
    assert all(len(each) == 1 for each in ids) and len(set.union(*ids)) == len(names), ids


def test_crossing_objects_retain_their_ids():
    right = Rectangle("a", 0, [(20, 4 + 5 * time) for time in range(16)])
    left = Rectangle("b", 1, [(24, 84 - 5 * time) for time in range(16)])
    scene = draw_scene([right, left])
    masks, tracker = follow(scene)
    assert_one_id(masks, scene[1], "a", "b")
    assert {number: each.class_id for number, each in tracker.tracked_objects().items()} == {1: 0, 2: 1}
    for mask, found in zip(masks, scene[1], strict=True):  # whose objects do not overlap
        expected = np.zeros_like(mask)
        for name, runs in zip(found.names, found.masks, strict=True):
            runs.paint(expected, "ab".index(name) + 1)
        np.testing.assert_array_equal(mask, expected)


def test_close_objects_of_a_class_retain_their_ids():
    pair = [Rectangle(name, 0, [(10 + 17 * row, 4 + 4 * time) for time in range(14)], similar=True)
            for row, name in enumerate("ab")]  # fmt: skip
    scene = draw_scene(pair)
    assert_one_id(follow(scene)[0], scene[1], "a", "b")


def test_late_object_gets_the_next_id():
    early = Rectangle("a", 0, [(8, 8 + 2 * time) for time in range(12)])
    late = Rectangle("b", 0, [None] * 5 + [(40, 70 - 3 * time) for time in range(7)])
    scene = draw_scene([early, late])
    masks, _ = follow(scene)
    assert ids_of(masks, scene[1], "a") == [1] * 12
    assert ids_of(masks, scene[1], "b") == [None] * 5 + [2] * 7


@pytest.mark.parametrize(("gap", "keep", "later"), [(2, 3, 1), (3, 3, 1), (4, 3, 2), (12, 30, 1), (12, 5, 2)])
def test_hidden_object_retains_its_id_for_keep_frames(gap, keep, later):
    """Also for longer than the frames in memory, and never takes an ID that has ended."""
    boxes = [(20, 10 + 2 * time) for time in range(5)] + [None] * gap + [(20, 22 + 2 * time) for time in range(4)]
    other = Rectangle("b", 1, [(44, 70)] * len(boxes))
    scene = draw_scene([Rectangle("a", 0, boxes), other])
    masks, tracker = follow(scene, keep=keep)
    assert ids_of(masks, scene[1], "a")[:5] == [1] * 5
    assert ids_of(masks, scene[1], "a")[5 + gap :] == [1 if later == 1 else 3] * 4
    assert ids_of(masks, scene[1], "b") == [2] * len(boxes)
    assert len(tracker.tracked_objects()) == 1 + later
    assert tracker.state()["labels"].shape[::3] == (NEAR.context, 3)


def test_missed_object_is_followed_but_not_shown():
    boxes = [(20, 6 + 3 * time) for time in range(20)]
    scene = draw_scene([Rectangle("a", 0, boxes, missed=range(4, 14))])
    masks, _ = follow(scene)
    assert ids_of(masks, scene[1], "a") == [1] * 4 + [None] * 10 + [1] * 6
    assert not masks[4:14].any()


def test_object_that_was_missed_at_first_gets_one_id():
    boxes = [(20, 30)] * 12
    scene = draw_scene([Rectangle("a", 0, boxes, missed=range(6)), Rectangle("b", 1, boxes and [(44, 60)] * 12)])
    masks, tracker = follow(scene)
    assert ids_of(masks, scene[1], "a") == [None] * 6 + [2] * 6
    assert len(tracker.tracked_objects()) == 2


def test_object_smaller_than_a_cell_retains_its_id():
    scene = draw_scene([Rectangle("a", 0, [(20, 30 + 4 * time) for time in range(8)], size=(3, 3))])
    assert_one_id(follow(scene)[0], scene[1], "a")


def test_another_class_gets_another_id():
    boxes = [(20, 10)] * 3
    first = draw_scene([Rectangle("a", 0, boxes)])
    second = draw_scene([Rectangle("a", 1, boxes)])
    scene = (first[0] + second[0], first[1] + second[1])
    assert ids_of(follow(scene)[0], scene[1], "a") == [1, 1, 1, 2, 2, 2]
    scene = (scene[0] + first[0], scene[1] + first[1])
    assert ids_of(follow(scene)[0], scene[1], "a") == [1, 1, 1, 2, 2, 2, 1, 1, 1]


def test_low_scores_and_stuff_are_left_out():
    boxes = [(8, 8 + time) for time in range(4)]
    low = Rectangle("a", 0, boxes, score=0.3)
    stuff = Rectangle("b", 2, [(40, 40)] * 4)
    scene = draw_scene([low, stuff, Rectangle("c", 1, [(40, 8)] * 4)])
    masks, tracker = follow(scene)
    assert set(np.unique(masks)) == {0, 1} and tracker.tracked_objects()[1] == (1, pytest.approx(0.9))
    masks, tracker = follow(scene, min_score=0.3)
    assert set(np.unique(masks)) == {0, 1, 2}
    assert sorted(each.score for each in tracker.tracked_objects().values()) == pytest.approx([0.3, 0.9])


def test_object_that_only_a_hidden_one_covers_gets_an_id():
    masks = np.zeros((3, *SIZE), bool)
    for mask, left in zip(masks, (10, 17, 24), strict=True):  # most of the second lies in the first one
        mask[20:40, left : left + 15] = True
    frames, _ = draw_scene([Rectangle("a", 0, [(20, 10)])])
    found, _ = follow((frames, [Objects.of_masks(masks, [0, 1, 1], [0.9, 0.8, 0.7])]))
    np.testing.assert_array_equal(found[0], np.where(masks[0], 1, 2 * masks[2]))


def test_frames_without_objects_are_tracked():
    scene = draw_scene([Rectangle("a", 0, [None] * 3 + [(20, 10)] * 2 + [None] * 2)])
    masks, tracker = follow(scene)
    assert ids_of(masks, scene[1], "a") == [None] * 3 + [1] * 2 + [None] * 2 and not masks[:3].any()
    empty = draw_scene([Rectangle("a", 0, [None] * 3)])
    masks, tracker = follow(empty)
    assert not masks.any() and tracker.tracked_objects() == {}


def random_scene(seed, length=10, size=SIZE):
    """Return a scene of some rectangles that walk, vanish and are missed, of which some overlap."""
    rng = np.random.default_rng(seed)
    objects = []
    for name in "abcde":
        start, step = rng.integers(0, 50, 2), rng.integers(-4, 5, 2)
        boxes = [tuple((start + time * step).tolist()) if rng.random() < 0.8 else None for time in range(length)]
        shape = tuple(rng.integers(3, 24, 2).tolist())
        score = float(rng.choice([0.4, 0.6, 0.9]))
        objects.append(Rectangle(name, int(rng.integers(3)), boxes, size=shape, score=score, missed=(3, 7)))
    return draw_scene(objects, size)


@pytest.mark.parametrize("seed", range(10))
def test_masks_are_those_of_the_rules(seed):
    frames, objects = random_scene(seed, 8, (40, 56))
    keep = seed % 4
    plain = PlainTracks(Colours(), NEAR, keep)
    expected = [plain.track(*each) for each in zip(frames, objects, strict=True)]
    settings = MatchSettings(context=4, radius=4, window_first=seed % 2 == 0)  # the window applies to every frame
    masks, tracker = follow((frames, objects), settings=settings, keep=keep)
    np.testing.assert_array_equal(masks, expected)
    assert len(tracker.tracked_objects()) == plain.next - 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", [0, 2, 30])
def test_restored_identities_continue_exactly(seed, keep):
    frames, objects = random_scene(seed)
    whole, tracker = follow((frames, objects), batch=1, keep=keep)
    first = ObjectTracker(make_model(objects), NEAR, keep=keep)
    assert first.state() == {}
    cut = 4 + seed % 3
    found = [mask for frame in frames[:cut] for mask in first.track([frame], [None])]
    state = {key: value.clone() for key, value in first.state().items()}
    second = ObjectTracker(make_model(objects[cut:]), NEAR, keep=keep)
    second.load(state)
    found += [mask for frame in frames[cut:] for mask in second.track([frame], [None])]
    np.testing.assert_array_equal(found, whole)
    assert second.tracked_objects() == tracker.tracked_objects()
    for key, value in tracker.state().items():
        torch.testing.assert_close(second.state()[key], value, rtol=0, atol=0)
    np.testing.assert_array_equal(follow((frames, objects), batch=4, keep=keep)[0], whole)


def test_identity_settings_and_invalid_states_differ():
    scene = random_scene(0, 3)
    _, tracker = follow(scene)
    told = tracker.settings
    assert told["kind"] == "identities" and "window_first" not in told["tracker"]
    assert {"tracker.repeat_first", "slots", "resolution.crop"} <= set(tracker.unread)
    for options in ({"keep": 3}, {"min_score": 0.1}, {"settings": MatchSettings(context=2)}):
        assert follow(scene, **options)[1].settings != told
    state = tracker.state()
    for key in state:
        with pytest.raises(ValueError, match=key):
            ObjectTracker(make_model([]), NEAR).load({name: value for name, value in state.items() if name != key})
    with pytest.raises(ValueError, match="channels"):
        ObjectTracker(make_model([]), NEAR).load({**state, "labels": state["labels"][..., :1]})


def test_masks_for_a_model_of_objects_are_refused():
    (frames, objects) = random_scene(0, 2)
    tracker = ObjectTracker(make_model(objects), NEAR)
    assert_refused(lambda: tracker.track(frames, [frames[0][..., 0], None]), "labels are given")


def test_too_many_ids_are_refused_with_their_count():
    size = (16, 16 * 17)
    numbers = np.arange(16 * 17).reshape(16, 17).repeat(16, axis=1).reshape(size)
    masks = np.stack([numbers == number for number in range(254)])
    found = Objects.of_masks(masks, [0] * 254, [0.9] * 254)
    frame = np.zeros((*size, 3), np.uint8)
    tracker = ObjectTracker(make_model([found]), NEAR)
    (mask,) = tracker.track([frame], [None])
    np.testing.assert_array_equal(np.unique(mask), np.arange(255))
    more = Objects.of_masks(np.ones((1, *size), bool), [1], [0.9])
    tracker = ObjectTracker(make_model([found, more]), NEAR)
    assert_refused(lambda: tracker.track([frame] * 2, [None] * 2), "255 objects", "254", "mode.min_score")


def test_matching_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    matched = 0
    for _ in range(500):
        tracks, objects = rng.integers(0, 4), rng.integers(0, 4)
        iou = rng.choice([0, 0.4, 0.5, 0.5, 0.7, rng.random()], (tracks, objects))
        classes = rng.integers(0, 2, tracks), rng.integers(0, 2, objects)
        pairs = match_objects(iou, classes[0][:, None] == classes[1])
        assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)
        assert all(iou[pair] >= 0.5 and classes[0][pair[0]] == classes[1][pair[1]] for pair in pairs)
        is_pair = (iou >= 0.5) & (classes[0][:, None] == classes[1])
        best = max(sum(iou[pair] for pair in some) for some in pairings([*zip(*np.nonzero(is_pair), strict=True)]))
        assert sum(iou[pair] for pair in pairs) == pytest.approx(best, abs=1e-12)
        matched += len(pairs)
    assert matched > 200


def test_pixels_belong_to_the_highest_score():
    rng = np.random.default_rng(1)
    for _ in range(200):
        count = rng.integers(0, 6)
        masks = np.zeros((count, 9, 11), bool)
        for mask in masks:
            top, left = rng.integers(0, 10, 2)
            mask[top : top + rng.integers(0, 9), left : left + rng.integers(0, 9)] = True
        scores = rng.choice([0.5, 0.7, 0.9], count)
        kept, numbers = separate_objects(Objects.of_masks(masks, [*range(count)], scores))
        expected = np.zeros((9, 11), int)
        order = []
        for place in sorted(range(count), key=lambda place: (-scores[place], place)):
            free = masks[place] & (expected == 0)
            if masks[place].sum() and 2 * free.sum() >= masks[place].sum():
                order.append(place)
                expected[free] = len(order)
        assert kept.classes.tolist() == order
        np.testing.assert_array_equal(numbers, expected)


def test_head_that_runs_the_blocks_is_tracked(tiny_backbone):
    """As head=eomt, whose features come from the same pass."""
    frames, objects = draw_scene([Rectangle("a", 0, [(8 + time, 8) for time in range(5)])])
    torch.manual_seed(0)
    head = EomtHead(24, 1, 3, patch_size=8, blocks=1, num_queries=5)
    model = SegmentationModel(tiny_backbone(), head, task=KnownObjects(objects)).eval()
    masks = ObjectTracker(model, NEAR).track(frames, [None] * 5)
    assert ids_of(masks, objects, "a") == [1] * 5


@pytest.mark.parametrize("seed", range(3))
def test_rendered_video_reaches_full_score(seed):
    """Perfect objects of a rendered video, in another order in each frame, have a J&F of nearly 1."""
    frames, masks = zip(*draw_video((seed,), 16, (96, 128)), strict=True)
    rng = np.random.default_rng(seed)
    objects = []
    for mask in masks:
        labels = rng.permutation(np.setdiff1d(mask, 0))
        objects.append(
            Objects.of_masks(mask == labels[:, None, None], [0] * len(labels), rng.random(len(labels)) / 2 + 0.5)
        )
    found, tracker = follow(([*frames], objects), settings=MatchSettings())
    count, proposals = int(max(mask.max() for mask in masks)), int(found.max())
    assert proposals <= Davis2017Unsupervised().max_proposals
    pairs = [
        np.stack(pair_scores(mask, each, count, max(proposals, count), mask == 255))
        for mask, each in zip(masks, found, strict=True)
    ]
    series = np.stack(pairs, axis=-1)
    match = match_proposals(*series)
    assert series[:, match, np.arange(count)].mean() > 0.95

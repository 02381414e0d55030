import json

import numpy as np
import pytest
import torch
from mistakes import refusals
from safetensors.torch import load, save
from slot_scene import BLUE, GREEN, GREY, RED, Colours, assert_cells, at_cells, crossing_squares, model_of, paint

from dinoseg.extensions.slots.tracker.appearance import Appearance
from dinoseg.extensions.slots.tracker.settings import SlotTracking
from dinoseg.extensions.slots.tracker.tracker import SlotTracker
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import check_annotations

FRAMES, IDS = crossing_squares(3)
SIX, SIX_IDS = crossing_squares(6)
PAIR, PAIR_IDS = paint({RED: (8, 4), BLUE: (20, 24)})
SWAPPED, _ = paint({BLUE: (8, 4), RED: (20, 24)})
TABLE = np.array([0, 7, 3], np.uint8)  # ids of other objects


def follow(model, frames, labels=None, **settings):
    return SlotTracker(model, SlotTracking(**settings)).track(frames, labels or [None] * len(frames))


def first(mask, length):
    return [mask] + [None] * (length - 1)


class TestWithoutLabels:
    def test_hidden_object_is_recognised_by_its_appearance(self):
        alone, _ = paint({BLUE: (20, 24)})
        gone, _ = paint({})
        back, places = paint({BLUE: (4, 36), RED: (20, 4)})
        frames = [PAIR, alone, gone, gone, back]
        model = model_of([GREY, RED, BLUE], predictor="none", scramble=True)
        masks = follow(model, frames, match="appearance")
        before, after = at_cells(masks[0]), at_cells(masks[-1])
        for now, then in ((0, 0), (1, 2), (2, 1)):  # grey, blue, red: numbers of the first frame's paint
            (one,) = np.unique(after[at_cells(places) == now])
            assert [one] == np.unique(before[at_cells(PAIR_IDS) == then])

    def test_appearance_is_that_of_all_frames_and_of_no_padding(self):
        frames, _ = crossing_squares(4, (32, 49))  # of 8 x 13 cells, the last column a quarter of a cell wide
        tracker = SlotTracker(model_of(predictor="none"), SlotTracking(match="appearance"))
        tracker.track(frames, [None] * 4)
        state = tracker.state()
        assert torch.equal(state["path"], torch.eye(4, dtype=torch.float64))  # no overlap decides anything
        assert state["whole"].tolist() == [0] and state["cells"].sum() == 4 * 8 * 12

    def test_two_passes_know_the_video_before_its_first_frame(self):
        settings = SlotTracking(match="appearance", passes=2)
        model = model_of()
        tracker = SlotTracker(model, settings, batch_size=4)
        tracker.look_ahead(lambda: [(SIX[:1], [None])])  # of another video: forgotten at the next look
        tracker.look_ahead(lambda: [(SIX[:4], [None] * 4), (SIX[4:], [None] * 2)])
        assert tracker.state() == {} and tracker.size is None
        begun = len(model.head.seen)
        tracker.track(SIX[:1], [None])
        state = tracker.state()
        assert begun == 7 and state["whole"].tolist() == [1] and state["cells"].sum() == 6 * 8 * 12
        assert_cells(tracker.track(SIX[1:], [None] * 5), np.add(SIX_IDS[1:], 1))
        assert torch.equal(tracker.state()["won"], state["won"])

    def test_one_pass_does_not_look_ahead(self):
        SlotTracker(model_of(), SlotTracking(match="appearance")).look_ahead(pytest.fail)

    @pytest.mark.parametrize("looks", [1, 2])
    def test_number_of_passes_follows_the_settings(self, looks, monkeypatch):
        told = []
        real = Appearance.step
        monkeypatch.setattr(Appearance, "step", lambda *given, **more: told.append(given[5]) or real(*given, **more))
        tracker = SlotTracker(model_of(), SlotTracking(match="appearance", appearance=5.0, passes=looks))
        tracker.look_ahead(lambda: [(FRAMES, [None] * 3)])
        tracker.track(FRAMES, [None] * 3)
        assert told == [5.0] * 3 * looks

    def test_looking_ahead_at_no_frames_learns_nothing(self):
        tracker = SlotTracker(model_of(), SlotTracking(match="appearance", passes=2))
        tracker.look_ahead(lambda: [])
        assert tracker.track([], []) == [] and tracker.state() == {}

    @pytest.mark.parametrize("size", [(30, 45), (29, 33), (33, 49)])
    def test_padding_is_cropped(self, size):
        frames, ids = crossing_squares(3, size)
        for mask, own in zip(follow(model_of(), frames), ids, strict=True):
            assert mask.shape == size and (mask == own + 1).mean() > 0.97

    def test_frames_are_seen_at_the_scale_of_the_model(self):
        large = [np.kron(frame, np.ones((2, 2, 1), np.uint8)) for frame in FRAMES]
        for mask, own in zip(follow(model_of(scale=0.5), large), IDS, strict=True):
            assert mask.shape == (64, 96) and (mask[::2, ::2] == own + 1).mean() > 0.98

    def test_254_slots_use_all_ids(self):
        assert follow(model_of([GREY] * 254), crossing_squares(1)[0])[0].max() <= 254


class TestWithLabels:
    @pytest.mark.parametrize("match", ["auto", "overlap", "similarity", "appearance"])
    @pytest.mark.parametrize("predictor", ["carry", "none"])
    def test_objects_that_change_places_keep_their_ids(self, match, predictor):
        model = model_of(predictor=predictor, scramble=True)
        masks = follow(model, SIX, first(TABLE[SIX_IDS[0]], 6), match=match)
        assert_cells(masks, TABLE[np.stack(SIX_IDS)])

    def test_second_pass_follows_appearance_in_any_slot_order(self):
        model = model_of(predictor="none", scramble=True)
        tracker = SlotTracker(model, SlotTracking(match="appearance", passes=2))
        tracker.look_ahead(lambda: [(SIX[3:], first(TABLE[SIX_IDS[3]], 3))])  # whose slots come in another order
        masks = tracker.track(SIX[:1], [TABLE[SIX_IDS[0]]])
        assert not torch.equal(tracker.state()["successors"], torch.arange(4))
        masks += tracker.track(SIX[1:], [None] * 5)
        assert_cells(masks, TABLE[np.stack(SIX_IDS)])

    def test_given_mask_overrides_earlier_appearance(self):
        settings = {"match": "appearance", "passes": 2, "appearance": 0.0, "background_slots": 1, "hold": "none"}
        tracker = SlotTracker(model_of(), SlotTracking(lock_on=True, **settings))
        tracker.look_ahead(lambda: [([SWAPPED], [PAIR_IDS])])
        assert np.array_equal(at_cells(tracker.track([PAIR], [PAIR_IDS])[0]), at_cells(PAIR_IDS))

    @pytest.mark.parametrize("match", ["similarity", "appearance"])
    def test_jumping_object_is_followed_by_appearance_not_overlap(self, match):
        model = model_of(predictor="none", scramble=True)
        by_look = follow(model, [PAIR, SWAPPED], [PAIR_IDS, None], match=match)[1]
        by_place = follow(model, [PAIR, SWAPPED], [PAIR_IDS, None], match="overlap")[1]
        assert by_look[12, 8] == 2 and by_look[24, 28] == 1
        assert by_place[12, 8] == 1 and by_place[24, 28] == 2

    def test_several_slots_serve_one_object(self):
        frame, ids = paint({RED: (8, 4), BLUE: (8, 12), GREEN: (20, 24)})
        labels = np.where(ids == 2, 1, ids)
        masks = follow(model_of(), [frame, frame], [labels, None])
        assert_cells(masks, [labels] * 2)

    def test_255_counts_as_background(self):
        mask = follow(model_of(), [PAIR], [np.where(PAIR_IDS == 2, 255, PAIR_IDS)])[0]
        assert np.array_equal(at_cells(mask), at_cells(np.where(PAIR_IDS == 2, 0, PAIR_IDS)))

    @pytest.mark.parametrize("settings", [{}, {"lock_on": True, "background_slots": 2, "extra_slots": 1}])
    def test_an_object_smaller_than_a_cell_is_followed(self, settings):
        frames = [paint({BLUE: (8, 4 + 4 * time)})[0] for time in range(3)]
        for time, frame in enumerate(frames):
            frame[21:23, 25 + 4 * time : 27 + 4 * time] = 0, 255, 0
        ids = np.zeros((32, 48), np.uint8)
        ids[21:23, 25:27] = 5
        masks = follow(model_of([GREY, BLUE, (0.325, 0.55, 0.325)]), frames, first(ids, 3), **settings)
        for time, mask in enumerate(masks):
            assert mask[22, 26 + 4 * time] == 5 and (mask == 5).sum() < 40

    @pytest.mark.parametrize("lock_on", [False, True])
    def test_a_frame_without_objects_gives_empty_masks(self, lock_on):
        assert not np.any(follow(model_of(), FRAMES, first(np.zeros_like(IDS[0]), 3), lock_on=lock_on))

    @pytest.mark.parametrize("kind", [np.int64, np.uint16, np.int32])
    def test_labels_of_any_integer_type_do(self, kind):
        plain, other = (follow(model_of(), FRAMES, first(IDS[0].astype(each), 3)) for each in (np.uint8, kind))
        assert np.array_equal(plain, other)


class TestLaterObjects:
    @pytest.mark.parametrize("predictor", ["carry", "none"])
    def test_get_a_slot_of_the_background(self, predictor):
        shown = np.where(SIX_IDS[0] == 1, 1, 0)
        later = np.where(SIX_IDS[3] == 2, 9, 0)  # of object 1 this mask says nothing
        model = model_of(predictor=predictor, scramble=True)
        masks = follow(model, SIX, [shown, None, None, later, None, None])
        for time, (mask, own) in enumerate(zip(masks, SIX_IDS, strict=True)):
            expected = np.array([0, 1, 9 if time >= 3 else 0])[at_cells(own)]
            assert np.array_equal(at_cells(mask), expected)

    def test_may_be_the_first_ones(self):
        nothing = np.zeros_like(SIX_IDS[0])
        masks = follow(model_of(), SIX, [nothing, SIX_IDS[1], None, None, None, None])
        assert not masks[0].any()
        assert_cells(masks[1:], SIX_IDS[1:])

    def test_later_mask_of_known_objects_changes_nothing(self):
        wrong = np.where(SIX_IDS[2] == 0, 0, 3 - SIX_IDS[2])
        labels = first(SIX_IDS[0], 6)
        plain = follow(model_of(), SIX, labels)
        labels[2] = wrong
        assert np.array_equal(follow(model_of(), SIX, labels), plain)

    def test_uncovered_objects_are_reported(self, caplog, monkeypatch):
        void = SIX_IDS[0].copy()
        void[:2] = 255
        follow(model_of(), SIX, first(void, 6))
        labels = first(SIX_IDS[0], 6)
        follow(model_of(), SIX, labels)
        assert not caplog.records
        follow(model_of([GREY]), SIX[:1], labels[:1], lock_on=True)
        assert not caplog.records
        follow(model_of([RED, RED, GREY]), SIX, labels)
        assert "No slot covers the first mask's object 1 (of 2): another object wins its cells" in caplog.text
        assert "Set slots=lock_on, a larger head.num_slots" in caplog.text and len(caplog.records) == 1
        tracker = SlotTracker(model_of([RED, RED, GREY]), SlotTracking())
        for number in range(2):  # a mask of a later frame says nothing of the first one's slots
            tracker.track(SIX[number : number + 1], [SIX_IDS[number]])
        assert len(caplog.records) == 2
        none = lambda masks, size, valid: torch.zeros(size, dtype=torch.int64)  # noqa: E731
        monkeypatch.setattr("dinoseg.extensions.slots.tracker.tracker.winners", none)
        follow(model_of([GREY]), SIX[:1], labels[:1], lock_on=True)
        assert "objects 1, 2 (of 2)" in caplog.text and "Set a larger head.num_slots" in caplog.text


class TestLockOn:
    def test_locked_identical_slots_follow_the_first_mask(self):
        labels = first(SIX_IDS[0], 6)
        assert not np.array_equal(at_cells(follow(model_of([GREY]), SIX, None)[0]) - 1, at_cells(SIX_IDS[0]))
        for settings in ({}, {"slots_per_object": 3, "background_slots": 1}):
            masks = follow(model_of([GREY]), SIX, labels, lock_on=True, **settings)
            assert_cells(masks, SIX_IDS)

    @pytest.mark.parametrize("key", [{"extra_slots": 2}, {"hold": "background"}, {"hold": "both"}])
    def test_missing_class_attention_is_refused_only_where_needed(self, key):
        (word,) = (f"slots.{name}={value}" for name, value in key.items())
        with pytest.raises(UserError, match=rf"{word}.* needs a backbone with a class token"):
            SlotTracker(model_of(class_attention=False), SlotTracking(lock_on=True, **key))
        model = model_of([GREY, RED, BLUE], class_attention=False)
        assert_cells(follow(model, FRAMES[:2], first(IDS[0], 2), lock_on=True, hold="none"), IDS[:2])


@pytest.mark.parametrize(("groups", "forced"), [("initial", [True, False, False]), ("always", [True] * 3)])
@pytest.mark.parametrize("lock_on", [False, True])
def test_the_class_attention_splits_the_slots(groups, forced, lock_on):
    model = model_of([GREY] if lock_on else (GREY, GREY, RED, BLUE, GREEN), sizes=[2, 3], groups=groups)
    tracker = SlotTracker(model, SlotTracking(lock_on=lock_on, background_slots=4), batch_size=2)
    masks = tracker.track(FRAMES, first(IDS[0], 3))
    assert [seen[0] is not None for seen in model.head.seen] == ([True] * 3 if lock_on else forced)
    assert all(seen[1] == ([4, 2] if lock_on else [2, 3]) for seen in model.head.seen)
    for time, (allowed, sizes) in enumerate(model.head.seen):
        if allowed is not None and not (lock_on and time == 0):
            background = at_cells(IDS[time]) == 0
            for slot, cells in enumerate(allowed[0].numpy()):
                assert np.array_equal(cells, background if slot < sizes[0] else background | True)
    assert_cells(masks, IDS)


STORIES = {
    "unlabelled": ({}, {}),
    "matched": ({"match": "overlap"}, {"predictor": "none", "scramble": True}),
    "alike": ({"match": "appearance"}, {"predictor": "none", "scramble": True}),
    "twice": ({"match": "appearance", "passes": 2}, {"predictor": "none", "scramble": True}),
    "locked twice": ({"match": "appearance", "passes": 2, "lock_on": True, "slots_per_object": 2}, {}),
    "grouped twice": ({"match": "appearance", "passes": 2}, {"groups": "always", "sizes": [1, 3]}),
    "similar": ({"match": "similarity"}, {"predictor": "none", "scramble": True}),
    "locked": ({"lock_on": True, "slots_per_object": 2}, {}),
    "grouped": ({}, {"groups": "always", "sizes": [1, 3]}),
}


@pytest.mark.parametrize("story", STORIES)
class TestState:
    def make(self, story, batch_size=2, *, ahead=True):
        settings, kwargs = STORIES[story]
        tracker = SlotTracker(model_of(**kwargs), SlotTracking(**settings), batch_size=batch_size)
        if ahead:
            tracker.look_ahead(lambda: [(SIX, self.labels(story))])
        return tracker

    def labels(self, story):
        if story == "unlabelled":
            return [None] * 6
        labels = first(np.where(SIX_IDS[0] == 1, 4, 0), 6)
        labels[3] = np.where(SIX_IDS[3] == 2, 6, 0)
        return labels

    def test_a_restart_changes_nothing(self, story):
        labels = self.labels(story)
        whole = self.make(story).track(SIX, labels)
        assert len({int(value) for mask in whole for value in np.unique(mask)}) == 3
        for cut in (0, 2, 3, 6):
            before, after = self.make(story), self.make(story, ahead=not cut)
            masks = before.track(SIX[:cut], labels[:cut])
            kept = load(save(before.state()))
            if story == "matched" and cut == 2:  # what decides once the path has forgotten all
                assert not torch.equal(kept["successors"], torch.arange(4))
            before.track(SIX[cut:], labels[cut:])  # what goes on does not reach into a state
            after.load(kept)
            assert after.state().keys() == kept.keys()
            assert all(torch.equal(value, kept[name]) for name, value in after.state().items())
            masks += after.track(SIX[cut:], labels[cut:])
            assert np.array_equal(masks, whole)
            assert after.settings == before.settings

    def test_batches_change_nothing(self, story):
        labels = self.labels(story)
        whole = self.make(story).track(SIX, labels)
        for batch_size in (1, 4, 100):
            assert np.array_equal(self.make(story, batch_size).track(SIX, labels), whole)

    def test_does_not_grow(self, story):
        tracker = self.make(story)
        tracker.track(SIX, self.labels(story))
        sizes = {name: (value.shape, value.untyped_storage().nbytes()) for name, value in tracker.state().items()}
        for _ in range(4):
            tracker.track(SIX, [None] * 6)
        assert {n: (v.shape, v.untyped_storage().nbytes()) for n, v in tracker.state().items()} == sizes

    def test_is_empty_before_the_first_frame(self, story):
        two = (SIX[:2], self.labels(story)[:2])
        tracker = self.make(story)
        assert tracker.state() == {} and tracker.track([], []) == []
        masks = tracker.track(*two)
        tracker.load({})
        assert tracker.state() == {} and np.array_equal(tracker.track(*two), masks)


def test_settings_cover_all_influences_on_masks():
    plain = SlotTracker(model_of()).settings
    assert json.loads(json.dumps(plain)) == plain
    others = [
        SlotTracker(model_of(), SlotTracking(lock_on=True)).settings,
        SlotTracker(model_of(scale=0.5)).settings,
        SlotTracker(model_of([RED, GREY, BLUE, GREEN])).settings,
        SlotTracker(model_of(), autocast=lambda: torch.autocast("cpu", torch.bfloat16)).settings,
    ]
    assert all(other != plain for other in others)
    assert SlotTracker(model_of(), SlotTracking(appearance=3.0)).settings == plain  # without a say
    said = [{}, {"passes": 2}, {"appearance": 3.0}]
    names = [
        json.dumps(SlotTracker(model_of(), SlotTracking(match="appearance", **one)).settings["slots"]) for one in said
    ]
    assert len({*names, json.dumps(plain["slots"])}) == 4
    assert SlotTracker(model_of(), batch_size=9).settings == plain


SETTINGS = check_annotations(SlotTracking)
LATER = "mask of a later frame, but not of the first"
THREE = paint({RED: (8, 4), BLUE: (20, 24), GREEN: (4, 36)})
THREE_SLOTS = [GREY, RED, BLUE]
NAN = float("nan")
FULL = "3 slots cannot track 3 objects"
NOT_IDS = (" ids are whole numbers from 0 ", " to 254")


def settings(**values):
    return lambda: SETTINGS(**values)


def tracked(*batches, colours=(GREY, RED, BLUE, GREEN), **settings):
    """Return a function that gives one tracker batches of (frames, labels); None: no labels."""
    tracker = SlotTracker(model_of(colours), SlotTracking(**settings))
    return lambda: [tracker.track(frames, labels or [None] * len(frames)) for frames, labels in batches]


def labelled(mask, **options):
    return tracked((FRAMES[:1], [mask]), **options)


def ids_of(dtype, value):
    ids = np.zeros((32, 48), dtype)
    ids[3, 4] = value
    return ids


def state_with(name, value):
    """Return a function that loads a state of which a tensor has another value."""

    def load():
        tracker = SlotTracker(model_of(), SlotTracking(match="appearance"))
        tracker.track(FRAMES[:1], [None])
        state = tracker.state()
        state[name].view(-1)[:] = value
        tracker.load(state)

    return load


test_message_names_value_and_remedy = refusals(
    {
        "unknown match": (settings(match="nearest"), "match=nearest is unknown. Choose one of auto, overlap, soft_iou"),
        "unknown hold": (settings(hold="all"), "hold=all is unknown. Choose one of background, both, none"),
        "temperature of 0": (settings(temperature=0), "temperature=0 is out of range. Give a number above 0"),
        "negative weight": (settings(appearance=-1), "appearance=-1 is out of range. Give a number from 0 to 1000000"),
        "three passes": (settings(match="appearance", passes=3), "passes=3 is out of range. Give 1 or 2"),
        "idle passes": (settings(passes=2), "slots.passes=2 has no effect with slots.match=auto", "slots.passes=1"),
        "no slot": (settings(lock_on=True, slots_per_object=0), "slots_per_object=0 is out", "number of at least 1"),
        "no background": (settings(lock_on=True, background_slots=0), "background_slots=0 is out", "of at least 1"),
        "negative extra": (settings(lock_on=True, extra_slots=-1), "extra_slots=-1 is out of", "of at least 0"),
        "extra unlocked": (settings(extra_slots=1), "slots.extra_slots=1 has no effect with slots.lock_on=false"),
        "more unlocked": (settings(slots_per_object=2), "slots_per_object=2 has no effect with slots.lock_on=false"),
        "no slots": (lambda: SlotTracker(SegmentationModel(Colours(), LinearHead(3, 1, 2))), "no slots", "head=slots"),
        "255 slots": (tracked((FRAMES, None), colours=[GREY] * 255), "head.num_slots=255 exceeds the mask ids 1 to"),
        "NaN": (tracked((FRAMES, None), colours=[(NAN, 0.0, 0.0), RED]), "not finite", "engine.precision=fp32"),
        "id 300": (labelled(ids_of(np.int32, 300)), "A mask of type ", *NOT_IDS),
        "a negative id": (labelled(ids_of(np.int16, -1)), "A mask of type ", *NOT_IDS),
        "half an id": (labelled(ids_of(np.float32, 0.5)), "A mask of type ", *NOT_IDS),
        "a later mask": (tracked((FRAMES, [None, IDS[1], None])), LATER),
        "a mask of a later batch": (tracked((FRAMES[:2], None), (FRAMES[2:], [IDS[2]])), LATER),
        "no first mask": (tracked((FRAMES, None), lock_on=True), "slots.lock_on=true", "missing", "lock_on=false"),
        "one look": (tracked((FRAMES, None), match="appearance", passes=2), "slots.passes=2 needs", "look_ahead", "=1"),
        "three objects": (labelled(THREE[1], colours=THREE_SLOTS), FULL, "background", "head.num_slots"),
        "a later third": (tracked((FRAMES, [IDS[0], None, IDS[0] * 0 + 9]), colours=THREE_SLOTS), FULL, "lock_on=true"),
    }
)

test_state_without_sense_is_refused = refusals(
    {
        "negative counts": (state_with("cells", -1.0), "cells"),
        "counts of 0": (state_with("cells", 0.0), "cells"),
        "neither part nor whole": (state_with("whole", 2), "whole"),
        "a whole of one pass": (state_with("whole", 1), "whole"),
        "appearances of NaN": (state_with("won", NAN), "won"),
    },
    error=ValueError,
)


def test_more_objects_than_slots_are_locked_on():
    frame, ids = THREE
    assert np.array_equal(at_cells(follow(model_of(THREE_SLOTS), [frame], [ids], lock_on=True)[0]), at_cells(ids))

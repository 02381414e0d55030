"""The brush changes the mask that is downloaded, and nothing else."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dinoseg.data.classes.labels import Labels
from dinoseg.extensions.serving import mask_editor
from dinoseg.extensions.serving.mask_editor import MaskEditor, count_pixels, encode_mask

LABELS = Labels(("dark", "red", "green"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)), 255)


def make_editor():
    return MaskEditor(np.zeros((40, 60), np.uint8), LABELS)


@pytest.mark.parametrize("radius", [1, 3, 10])
def test_a_click_paints_a_disc(radius):
    given = np.zeros((40, 60), np.uint8)
    editor = MaskEditor(given, LABELS)
    editor.paint([[30.5, 20.5], [30.5, 20.5]], radius, 2)
    rows, columns = np.mgrid[:40, :60]
    distance = np.hypot(columns - 30, rows - 20)
    assert (editor.mask[distance <= radius - 1] == 2).all()
    assert (editor.mask[distance > radius + 1] == 0).all()
    assert editor.counts[2] == (editor.mask == 2).sum() and not given.any()


def test_a_stroke_joins_its_points():
    editor = make_editor()
    editor.paint([[5, 10], [50, 10], [50, 30]], 2, 1)
    assert (editor.mask[9:11, 5:50] == 1).all() and (editor.mask[10:30, 49:51] == 1).all()
    assert not editor.mask[20:, :40].any()


def test_strokes_are_undone_in_reverse_order():
    editor = make_editor()
    states = [editor.mask.copy()]
    for number, point in enumerate(([3, 3], [8, 5], [59, 39]), 1):
        editor.paint([point], 4, number % 3)
        states.append(editor.mask.copy())
        assert (editor.counts == np.bincount(editor.mask.ravel(), minlength=256)).all()
    for state in reversed(states):
        assert (editor.mask == state).all()
        editor.undo()
    assert (editor.mask == states[0]).all() and editor.counts[0] == editor.mask.size


def test_memory_of_undo_is_bounded(monkeypatch):
    monkeypatch.setattr(mask_editor, "_MAX_UNDO_BYTES", 5000)
    editor = make_editor()
    for _ in range(50):
        editor.paint([[0, 0], [60, 40]], 100, 1)
    assert sum(former.nbytes for *_, former in editor._strokes) == 2 * 40 * 60
    for number in range(50):
        editor.paint([[3, 3]], 1, number % 2)
    assert len(editor._strokes) == 50  # small ones are limited in number


def test_long_stroke_is_cut(monkeypatch):
    monkeypatch.setattr(mask_editor, "_MAX_PAINTED", 100)
    editor = make_editor()
    editor.paint([[5, 5], [15, 5], [55, 35]], 2, 1)
    assert editor.mask[5, 5:15].all() and not editor.mask[20:].any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (600, 900)])
def test_pixels_are_counted_in_parts(shape):
    mask = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert (count_pixels(mask) == np.bincount(mask.ravel(), minlength=256)).all()


@pytest.mark.parametrize("points", [[[1e9, 1e9], [-1e9, 5]], [[-500, -500]], [[30, 20]] * 30_000])
def test_points_outside_and_many_points_are_harmless(points):
    editor = make_editor()
    before = editor.mask.copy()
    editor.paint(points, 10**9, 1)
    editor.undo()
    assert (editor.mask == before).all()


@pytest.mark.parametrize("points", [[], "text", None, [[1]], [[float("nan"), 1]], [["a", "b"]], {"x": 1}])
def test_invalid_stroke_is_refused(points):
    with pytest.raises((ValueError, TypeError)):
        make_editor().paint(points, 2, 1)


def test_black_and_hidden_classes_are_transparent():
    editor = MaskEditor(np.array([[0, 1, 2, 255]], np.uint8), LABELS)
    editor.hidden = {2}
    layer = np.asarray(Image.open(io.BytesIO(editor.encode_layer())).convert("RGBA"))[0]
    assert layer[:, 3].tolist() == [0, 255, 0, 255] and layer[1, :3].tolist() == [255, 0, 0]
    image = np.full((1, 4, 3), 100, np.uint8)
    drawn = editor.draw(image, editor.mask, 0.5)[0]
    assert drawn[[0, 2]].tolist() == [[100] * 3] * 2 and drawn[1].tolist() == [178, 50, 50]


@pytest.mark.parametrize("ignored", [255, 3, 1])
def test_marks_stay_visible_and_cover_no_class(ignored):
    """The ignored id may be that of a class."""
    labels = Labels(("black", "red", "green"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)), ignored)
    editor = MaskEditor(np.array([[1, 1, 2, 0]], np.uint8), labels, np.array([[True, False, False, False]]))
    layer = np.asarray(Image.open(io.BytesIO(editor.encode_layer())).convert("RGBA"))[0]
    assert layer[:, 3].tolist() == [0, 255, 255, 0]
    image = np.full((1, 4, 3), 100, np.uint8)
    drawn = editor.draw(image, editor.mask, 1.0)[0]
    assert drawn[0].tolist() == [100] * 3 and drawn[1].tolist() != [100] * 3 and drawn[2].tolist() == [0, 255, 0]
    assert editor.mask.tolist() == [[1, 1, 2, 0]]


OVERLAPS = Labels(("white", "red", "green"), ((255, 255, 255), (255, 0, 0), (0, 255, 0)), 255)


def test_strokes_on_layers_change_one_class_and_are_undone():
    rng = np.random.default_rng(0)
    editor = MaskEditor((rng.random((3, 40, 60)) > 0.6).astype(np.uint8), OVERLAPS)
    states = []
    for number in range(60):
        states.append(editor.mask.copy())
        label = int(rng.integers(3))
        erase = bool(rng.integers(2))
        points = rng.integers(-5, 65, (2, 2)).tolist()
        editor.paint(points, int(rng.integers(1, 9)), label, erase=erase)
        changed = editor.mask != states[-1]
        assert not np.delete(changed, label, axis=0).any()
        assert (editor.mask[label][changed[label]] == int(not erase)).all() and editor.mask.max() <= 1
        assert (editor.counts[:3] == editor.mask.sum(axis=(1, 2))).all() and not editor.counts[3:].any(), number
    for state in reversed(states[10:]):  # 50 strokes can be undone
        editor.undo()
        assert (editor.mask == state).all() and (editor.counts[:3] == state.sum(axis=(1, 2))).all()
    editor.undo()
    assert (editor.mask == states[10]).all()


@pytest.mark.parametrize("ignore_index", [255, 3])
def test_layer_of_overlapping_classes_shows_each_in_its_colour(ignore_index):
    mask = (np.random.default_rng(1).random((3, 300, 40)) > 0.5).astype(np.uint8)
    editor = MaskEditor(mask, replace(OVERLAPS, ignore_index=ignore_index))
    for hidden in ((), (1,), (0, 1, 2)):
        editor.hidden = {*hidden}
        visible = np.array([layer * (label not in hidden) for label, layer in enumerate(mask)])
        with Image.open(io.BytesIO(editor.encode_layer())) as image:
            shown = np.asarray(image.convert("RGBA"))
        assert ((shown[..., 3] > 0) == visible.any(axis=0)).all()
        painted = np.array([(shown[..., :3] == colour).all(-1) & (shown[..., 3] > 0) for colour in OVERLAPS.palette])
        assert not (painted & (visible == 0)).any() and (painted.sum(axis=0) == visible.any(axis=0)).all()
        both = visible.sum(axis=0) > 1
        assert all((painted[label] & both).any() == bool(visible[label].any()) for label in range(3))
        image = np.full((300, 40, 3), 90, np.uint8)
        drawn = editor.draw(image, mask, 0.5)
        assert ((drawn != image).any(axis=-1) == visible.any(axis=0)).all()


@pytest.mark.parametrize("count", [1, 3])
def test_encoded_layers_are_read_as_masks_with_pages(count):
    layers = (np.random.default_rng(2).random((count, 30, 50)) > 0.5).astype(np.uint8)
    with Image.open(io.BytesIO(encode_mask(layers, OVERLAPS.palette))) as image:
        assert image.format == "TIFF" and image.n_frames == count
        for number, layer in enumerate(layers):
            image.seek(number)
            assert (np.asarray(image) == layer).all()

from pathlib import Path

import numpy as np
import pytest
from making import save
from mistakes import assert_refused, refusals
from PIL import Image

from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import MaskReader, Masks
from dinoseg.utils.errors import UserError

COLORS = ((0, 0, 0), (255, 0, 0), (0, 0, 255))
LABELS = Labels.of(["a", "b", "c"], COLORS, 255)
IDS = np.array([[0, 1], [2, 255], [1, 0]], np.uint8)
TWO = Labels.of(["no", "yes"], None, 255)
BINARY = Masks("binary")


def read_ids_of(tmp_path, pixels, rules=Masks(), labels=LABELS, **options):  # noqa: B008 (frozen)
    """Write a mask, and return what a reader makes of it."""
    return MaskReader(labels, rules).read(save(tmp_path / "m.png", pixels, **options))


def test_grey_palette_and_equal_channels_give_the_stored_ids(tmp_path):
    indexed = Image.fromarray(IDS).convert("L")
    indexed.putpalette([9, 8, 7] * 256)  # the colours say nothing here
    indexed.save(tmp_path / "p.png")
    found = [MaskReader(LABELS, Masks()).read(tmp_path / "p.png"), read_ids_of(tmp_path, IDS, dtype=np.uint16)]
    for ids in (*found, read_ids_of(tmp_path, IDS), read_ids_of(tmp_path, np.dstack([IDS] * 3))):
        assert ids.dtype == np.uint8
        np.testing.assert_array_equal(ids, IDS)


@pytest.mark.parametrize("rules", [{}, {"ids": {7: 2, 255: 1, 9: 255}}, {"others": "c"}, {"reduce_zero_label": True}])
def test_wide_ids_are_looked_up_like_bytes(tmp_path, rules):
    reader = MaskReader(LABELS, Masks(**rules))
    rng = np.random.default_rng(0)
    known = np.flatnonzero(reader._table[:256] >= 0)
    for size in ((1, 1), (1, 7), (13, 1), (37, 53)):
        numbers = rng.choice(known, size)
        ids = [reader.read(save(tmp_path / f"{kind}.png", numbers, dtype=kind)) for kind in ("uint8", "uint16")]
        rgb = reader.read(save(tmp_path / "rgb.png", np.dstack([numbers] * 3)))
        expected = np.vectorize(lambda number: reader._table[number])(numbers)
        assert all(found.dtype == np.uint8 and found.flags.writeable for found in (*ids, rgb))
        assert all(np.array_equal(found, expected) for found in (*ids, rgb))
    for number in rng.permutation(np.flatnonzero(reader._table[:256] < 0))[:3]:
        for kind in ("uint8", "uint16"):
            with pytest.raises(UserError, match=f"holds the ids {number}, which are not classes"):
                reader.read(save(tmp_path / "foreign.png", [[known[0], number]], dtype=kind))


def test_colours_give_classes_also_from_an_indexed_file(tmp_path):
    rules = Masks("palette", colors={"1": [[9, 9, 9], [250, 0, 0]]}, ignore_colors=[[255, 255, 255]])
    colors = np.array([*COLORS, (255, 255, 255), (9, 9, 9), (250, 0, 0)], np.uint8)
    pixels = colors[[[2, 0, 1, 4], [3, 2, 2, 5]]]
    save(tmp_path / "c.png", pixels)
    Image.fromarray(pixels).quantize(8).save(tmp_path / "q.png")
    for name in ("c.png", "q.png"):
        found = MaskReader(LABELS, rules).read(tmp_path / name)
        np.testing.assert_array_equal(found, [[2, 0, 1, 1], [255, 2, 2, 1]])


def test_binary_masks_are_read(tmp_path):
    np.testing.assert_array_equal(read_ids_of(tmp_path, [[0, 255]], BINARY, TWO), [[0, 1]])
    one_bit = tmp_path / "one.png"
    for ids in ([[1, 0]], [[1, 1]], [[0, 0]]):
        Image.fromarray(np.array(ids, bool)).save(one_bit)
        for rules in (BINARY, Masks()):  # no 255, ignored
            np.testing.assert_array_equal(MaskReader(TWO, rules).read(one_bit), ids)
    words = ("m.png ", " 3, 250. Values near 0 ", " lossy ", "threshold at 128")
    assert_refused(lambda: read_ids_of(tmp_path, [[0, 3, 250, 255]], BINARY, TWO), *words)
    assert_refused(lambda: read_ids_of(tmp_path, [[0, 1]], BINARY, TWO), "m.png ", " 1. ", "format=ids")
    disc = np.hypot(*np.mgrid[-40:40, -40:40]) < 25
    jpeg = save(tmp_path / "m.jpg", disc * 255, quality=80)
    assert_refused(lambda: MaskReader(TWO, BINARY).read(jpeg), "lossy compression: threshold at 128")


@pytest.mark.parametrize(
    ("values", "lossy"),
    [
        ([0, 1, 2, 3, 7], False),  # class numbers, which a threshold would destroy
        ([0, 1, 2, 255], False),  # with void
        ([0, 1, 9, 30, 128, 200, 240, 254, 255], True),
        ([5, 251], True),
        ([0, 254], True),
    ],
)
def test_remedy_for_non_binary_masks_depends_on_compression(tmp_path, values, lossy):
    remedies = ("threshold at 128",) * 2 if lossy else ("data.reader.masks.format=ids", "`masks: ids` in classes.yaml")
    described = Masks("binary", described={"ids": None})
    assert_refused(lambda: read_ids_of(tmp_path, [values], BINARY, TWO), remedies[0])
    assert_refused(lambda: read_ids_of(tmp_path, [values], described, TWO), remedies[1])


def test_ids_outside_the_classes_name_ids_and_file(tmp_path):
    ids = [[0, 3, 200], [254, 255, 1]]
    table = "'++data.reader.masks.ids={3: 255, 200: 255, 254: 255}'"
    assert_refused(lambda: read_ids_of(tmp_path, ids), "m.png holds the ids 3, 200, 254, ", "0 to 2, and 255", table)
    described = Masks(described={"ids": None})
    message = assert_refused(lambda: read_ids_of(tmp_path, ids, described), "`ignore: {ids: [3, 200, 254]}`")
    assert "data.reader.masks" not in message
    noise = np.arange(240).reshape(12, 20)
    assert_refused(lambda: read_ids_of(tmp_path, noise), "227 more, ", "do not look like class ids")
    assert_refused(lambda: read_ids_of(tmp_path, [[0, 40000]], dtype=np.uint16), "ids 40000,")
    huge = tmp_path / "h.tif"
    Image.fromarray(np.array([[-5, 70000]], np.int32)).save(huge)
    assert_refused(lambda: MaskReader(LABELS, Masks()).read(huge), "ids -5, 70000,")


@pytest.mark.parametrize(
    ("rules", "ids", "expected"),
    [
        (Masks(ids={0: 255, 7: 2, 1000: 0}), [0, 7, 2, 1, 1000], [255, 2, 2, 1, 0]),
        (Masks(ids={1: 0, 2: 1, 3: 255}), [1, 2, 3], [0, 1, 255]),
        (Masks(ids={1: 0}), [0, 1], [0, 0]),
        (Masks(ids={3: 255, 7: 2}), [0, 1, 7, 3], [0, 1, 2, 255]),  # nothing is said of 0 and 1
        (Masks(ids={0: -1, 10: 0}), [10, 1, 255], [0, 1, 255]),
        (Masks(reduce_zero_label=True), [0, 1, 3, 255], [255, 0, 2, 255]),
    ],
)
def test_table_maps_ids(tmp_path, rules, ids, expected):
    np.testing.assert_array_equal(read_ids_of(tmp_path, [ids], rules, dtype=np.uint16), [expected])


def rules(**arguments):
    return lambda: MaskReader(LABELS, Masks(**arguments))


def read_pixels(pixels, **arguments):
    return lambda: read_ids_of(Path(), pixels, Masks(**arguments))


def labels(classes, palette=None, ignore_index=255):
    return lambda: Labels.of(classes, palette, ignore_index)


UNKNOWN = [[[1, 2, 3], [255, 0, 1], [255, 0, 1], [0, 0, 0]]]
REPLACED = "would replace all ids of classes.yaml"
test_message_names_value_and_remedy = refusals(
    {
        "binary with ids": (rules(format="binary", ids={1: 0}), "ids has no effect"),
        "ids with ignored colours": (rules(ignore_colors=[[0, 0, 0]]), "ignore_colors has no effect"),
        "ids with colours": (rules(colors={0: [[0, 0, 0]]}), "masks.colors has no effect with format=ids"),
        "colours of id 3": (rules(format="palette", colors={3: [[1, 1, 1]]}), "for 3: give class ids from 0 to 2"),
        "colours of a": (rules(format="palette", colors={"a": [[1, 1, 1]]}), "colours for 'a'"),
        "a colour twice": (rules(format="palette", colors={0: [[255, 0, 0]]}), "(255, 0, 0) is used twice"),
        "two numbers": (rules(format="palette", colors={0: [[1, 1]]}), "Colour [1, 1]"),
        "binary with 0": (rules(format="binary", reduce_zero_label=True), "reduce_zero_label has no effect"),
        "binary of 3": (rules(format="binary"), "needs 2 classes, data.classes has 3", "set task=multilabel"),
        "binary of 1": (lambda: MaskReader(Labels.of(["a"], None, 255), BINARY), "data.classes has 1"),
        "to 3": (rules(ids={11: 3}), "maps 11 to 3: ", " 0 to 2, 255 to ignore them, or -1"),
        "to -2": (rules(ids={11: -2}), "maps 11 to -2"),
        "of -1": (rules(ids={-1: 0}), "maps -1"),
        "of a": (rules(ids={"a": 0}), "maps 'a'"),
        "beside ids of a file": (rules(ids={3: 255}, described={"ids": {"0": 1, "1": 0}}), REPLACED),
        "beside a file": (rules(ids={3: 255}, described={}), REPLACED),
        "ignored twice": (rules(format="palette", ignore_colors=[[255, 0, 0]]), "(255, 0, 0) is used twice"),
        "ignored 256": (rules(format="palette", ignore_colors=[[256, 0, 0]]), "Colour [256, 0, 0]"),
        "ids without a class": (
            read_pixels([[10, 0]], ids={0: -1, 10: 0}),
            "m.png holds the ids 0, which ",
            " stored in files as 1, 2, 10, and 255 is",
        ),
        "ids that a table lacks": (
            read_pixels([[0, 1, 2, 3]], ids={1: 0, 2: 1, 3: 255}),
            "ids 0, which are not classes",
        ),
        "ids beyond 1 to 3": (read_pixels([[4]], reduce_zero_label=True), "holds the ids 4, which are not classes"),
        "colours for ids": (read_pixels([[[0, 1, 0]]]), "colour image", "format=palette"),
        "unknown colours": (
            read_pixels(UNKNOWN, format="palette"),
            "m.png ",
            "(255, 0, 1), (1, 2, 3), on 3 pixels",
            "ignore_colors",
        ),
        "unknown colours of a file": (
            read_pixels(UNKNOWN, format="palette", described={"ids": None}),
            "not in classes.yaml",
            "`ignore: {colors: [[255, 0, 1], [1, 2, 3]]}`",
        ),
        "no class": (labels([]), "data.classes=[]: give a list of 1 to 255 names"),
        "a table of classes": (labels({"a": 0, "b": 1}), "give a list of 1 to 255 names"),
        "a set of classes": (labels({"a", "b"}), "give a list of 1 to 255 names"),
        "256 classes": (labels(["a"] * 256), "give a list of 1 to 255 names"),
        "a class twice": (labels(["a", "b", "a"]), "names a more than once"),
        "one colour": (labels(["a", "b"], [[0, 0, 0]]), "1 colours for 2 classes"),
        "a number of colours": (labels(["a"], 3), "0 colours for 1 classes"),
        "colour of fractions": (labels(["a"], [[0, 0, 0.5]]), "whole numbers"),
        "ignore 256": (labels(["a"], ignore_index=256), "ignore_index=256"),
        "ignore 255.0": (labels(["a"], ignore_index=255.0), "ignore_index=255.0"),
        "ignore -1": (labels(["a"], ignore_index=-1), "ignore_index=-1"),
    }
)


def test_overlapping_classes_have_no_black():
    colours = Labels.of(["a", "b", "c"], None, 255, has_layers=True).palette
    assert len(set(colours)) == 3 and (0, 0, 0) not in colours
    assert Labels.of(["a", "b"], None, 255).palette[0] == (0, 0, 0)
    given = Labels.of(["a", "b"], [[0, 0, 0], [9, 9, 9]], 255, has_layers=True)
    assert given.palette == ((255, 255, 255), (9, 9, 9))
    assert len(Labels.of(list(map(str, range(255))), None, 255, has_layers=True).palette) == 255

import numpy as np
import pytest
from making import save
from PIL import Image

from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import MaskReader, Masks
from dinoseg.utils.errors import UserError

COLORS = ((0, 0, 0), (255, 0, 0), (0, 0, 255))
LABELS = Labels.of(["a", "b", "c"], COLORS, 255)
IDS = np.array([[0, 1], [2, 255], [1, 0]], np.uint8)


def test_grey_palette_and_equal_channels_give_the_stored_ids(tmp_path):
    reader = MaskReader(LABELS, Masks())
    indexed = Image.fromarray(IDS).convert("L")
    indexed.putpalette([9, 8, 7] * 256)  # the colours say nothing here
    indexed.save(tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        assert image.mode == "P"
    for path in (
        save(tmp_path / "g.png", IDS),
        save(tmp_path / "three.png", np.dstack([IDS] * 3)),
        save(tmp_path / "wide.png", IDS, dtype=np.uint16),
        tmp_path / "p.png",
    ):
        ids = reader.read(path)
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


def test_zero_can_be_ignored(tmp_path):
    reader = MaskReader(LABELS, Masks(reduce_zero_label=True))
    np.testing.assert_array_equal(reader.read(save(tmp_path / "z.png", [[0, 1, 3, 255]])), [[255, 0, 2, 255]])
    with pytest.raises(UserError, match="holds the ids 4, which are not classes"):
        reader.read(save(tmp_path / "high.png", [[4]]))
    with pytest.raises(UserError, match="reduce_zero_label has no effect with format=binary"):
        Masks("binary", reduce_zero_label=True)


def test_colours_give_classes_also_from_an_indexed_file(tmp_path):
    reader = MaskReader(LABELS, Masks("palette", ignore_colors=[[255, 255, 255]]))
    colors = np.array([*COLORS, (255, 255, 255)], np.uint8)
    pixels = colors[[[2, 0, 1], [3, 2, 2]]]
    save(tmp_path / "c.png", pixels)
    Image.fromarray(pixels).quantize(8).save(tmp_path / "q.png")
    for name in ("c.png", "q.png"):
        np.testing.assert_array_equal(reader.read(tmp_path / name), [[2, 0, 1], [255, 2, 2]])


def test_unknown_colours_are_listed(tmp_path):
    pixels = np.zeros((3, 4, 3), np.uint8)
    pixels[0, 0], pixels[1, :2] = (1, 2, 3), (255, 0, 1)
    path = save(tmp_path / "c.png", pixels)
    with pytest.raises(UserError, match=r"c\.png .*\(255, 0, 1\), \(1, 2, 3\), on 3 pixels.*ignore_colors"):
        MaskReader(LABELS, Masks("palette")).read(path)
    with pytest.raises(UserError, match=r"not in classes\.yaml.*`ignore: \{colors: \[\[255, 0, 1\], \[1, 2, 3\]\]\}`"):
        MaskReader(LABELS, Masks("palette", described={"ids": None})).read(path)


def test_binary_masks_are_read(tmp_path):
    reader = MaskReader(Labels.of(["no", "yes"], None, 255), Masks("binary"))
    np.testing.assert_array_equal(reader.read(save(tmp_path / "b.png", [[0, 255]])), [[0, 1]])
    one_bit = tmp_path / "one.png"
    for ids in ([[1, 0]], [[1, 1]], [[0, 0]]):
        Image.fromarray(np.array(ids, bool)).save(one_bit)
        np.testing.assert_array_equal(reader.read(one_bit), ids)
        np.testing.assert_array_equal(MaskReader(reader.labels, Masks()).read(one_bit), ids)  # no 255, ignored
    with pytest.raises(UserError, match=r"j\.png .* 3, 250\. Values near 0 .* lossy .*threshold at 128"):
        reader.read(save(tmp_path / "j.png", [[0, 3, 250, 255]]))
    with pytest.raises(UserError, match=r"i\.png .* 1, 128\. .*format=ids"):
        reader.read(save(tmp_path / "i.png", [[0, 1, 128]]))
    with pytest.raises(UserError, match=r"i1\.png .* 1\. .*format=ids"):
        reader.read(save(tmp_path / "i1.png", [[0, 1]]))


@pytest.mark.parametrize(
    ("values", "lossy"),
    [
        ([0, 1, 2, 3, 7], False),  # class numbers, which a threshold would destroy
        ([0, 1, 2, 255], False),  # with void
        ([4], False),
        ([0, 1, 9, 30, 128, 200, 240, 254, 255], True),
        ([5, 251], True),
        ([0, 254], True),
    ],
)
def test_remedy_for_non_binary_masks_depends_on_compression(tmp_path, values, lossy):
    labels, path = Labels.of(["no", "yes"], None, 255), save(tmp_path / "m.png", [values])
    with pytest.raises(UserError, match="threshold at 128" if lossy else r"data\.reader\.masks\.format=ids"):
        MaskReader(labels, Masks("binary")).read(path)
    with pytest.raises(UserError, match="threshold at 128" if lossy else r"`masks: ids` in classes\.yaml"):
        MaskReader(labels, Masks("binary", described={"ids": None})).read(path)


def test_a_real_jpeg_of_a_binary_mask_is_lossy(tmp_path):
    disc = np.hypot(*np.mgrid[-40:40, -40:40]) < 25
    path = save(tmp_path / "m.jpg", disc * 255, quality=80)
    with pytest.raises(UserError, match="lossy compression: threshold at 128"):
        MaskReader(Labels.of(["no", "yes"], None, 255), Masks("binary")).read(path)


def test_ids_outside_the_classes_name_ids_and_file(tmp_path):
    path = save(tmp_path / "m.png", [[0, 3, 200], [254, 255, 1]])
    table = r"'\+\+data\.reader\.masks\.ids=\{3: 255, 200: 255, 254: 255\}'"
    with pytest.raises(UserError, match=rf"m\.png holds the ids 3, 200, 254, which .*0 to 2, and 255.*{table}"):
        MaskReader(LABELS, Masks()).read(path)
    with pytest.raises(UserError, match=r"`ignore: \{ids: \[3, 200, 254\]\}`") as caught:
        MaskReader(LABELS, Masks(described={"ids": None})).read(path)
    assert "data.reader.masks" not in str(caught.value)
    noise = save(tmp_path / "n.png", np.arange(240).reshape(12, 20))
    with pytest.raises(UserError, match="227 more, .*do not look like class ids"):
        MaskReader(LABELS, Masks()).read(noise)
    wide = save(tmp_path / "w.png", [[0, 40000]], dtype=np.uint16)
    with pytest.raises(UserError, match=r"ids 40000,"):
        MaskReader(LABELS, Masks()).read(wide)
    huge = tmp_path / "h.tif"
    Image.fromarray(np.array([[-5, 70000]], np.int32)).save(huge)
    with pytest.raises(UserError, match=r"ids -5, 70000,"):
        MaskReader(LABELS, Masks()).read(huge)


def test_table_maps_ids(tmp_path):
    reader = MaskReader(LABELS, Masks(ids={0: 255, 7: 2, 1000: 0}))
    path = save(tmp_path / "m.png", [[0, 7, 2, 1, 1000]], dtype=np.uint16)
    np.testing.assert_array_equal(reader.read(path), [[255, 2, 2, 1, 0]])


def test_remapping_ids_excludes_ids_not_in_the_table(tmp_path):
    reader = MaskReader(LABELS, Masks(ids={1: 0, 2: 1, 3: 255}))
    np.testing.assert_array_equal(reader.read(save(tmp_path / "a.png", [[1, 2, 3]])), [[0, 1, 255]])
    with pytest.raises(UserError, match="holds the ids 0, which are not classes"):
        reader.read(save(tmp_path / "b.png", [[0, 1, 2, 3]]))
    merged = MaskReader(LABELS, Masks(ids={1: 0}))
    np.testing.assert_array_equal(merged.read(save(tmp_path / "m.png", [[0, 1]])), [[0, 0]])
    kept = MaskReader(LABELS, Masks(ids={3: 255, 7: 2}))  # nothing is said of 0 and 1
    np.testing.assert_array_equal(kept.read(save(tmp_path / "c.png", [[0, 1, 7, 3]])), [[0, 1, 2, 255]])


def test_table_refuses_ids(tmp_path):
    reader = MaskReader(LABELS, Masks(ids={0: -1, 10: 0}))
    np.testing.assert_array_equal(reader.read(save(tmp_path / "m.png", [[10, 1, 255]])), [[0, 1, 255]])
    with pytest.raises(UserError, match=r"m\.png holds the ids 0, which .* stored in files as 1, 2, 10, and 255 is"):
        reader.read(save(tmp_path / "m.png", [[10, 0]]))


def test_several_colours_can_be_one_class(tmp_path):
    rules = Masks("palette", colors={"1": [[9, 9, 9], [250, 0, 0]]}, ignore_colors=[[1, 1, 1]])
    colors = np.array([*COLORS, (9, 9, 9), (250, 0, 0), (1, 1, 1)], np.uint8)
    path = save(tmp_path / "c.png", colors[[[0, 1, 2], [3, 4, 5]]])
    np.testing.assert_array_equal(MaskReader(LABELS, rules).read(path), [[0, 1, 2], [1, 1, 255]])


def test_coloured_image_read_as_ids_is_refused(tmp_path):
    path = save(tmp_path / "c.png", [[[0, 1, 0]]])
    with pytest.raises(UserError, match="colour image.*format=palette"):
        MaskReader(LABELS, Masks()).read(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "binary", "ids": {1: 0}}, "ids has no effect"),
        ({"ignore_colors": [[0, 0, 0]]}, "ignore_colors has no effect"),
        ({"colors": {0: [[0, 0, 0]]}}, "masks.colors has no effect with format=ids"),
        ({"format": "palette", "colors": {3: [[1, 1, 1]]}}, "colours for 3: give class ids from 0 to 2"),
        ({"format": "palette", "colors": {"a": [[1, 1, 1]]}}, "colours for 'a'"),
        ({"format": "palette", "colors": {0: [[255, 0, 0]]}}, r"\(255, 0, 0\) is used twice"),
        ({"format": "palette", "colors": {0: [[1, 1]]}}, r"Colour \[1, 1\]"),
        ({"format": "binary"}, "needs 2 classes, data.classes has 3"),
        ({"ids": {11: 3}}, "maps 11 to 3: .* 0 to 2, 255 to ignore it, or -1"),
        ({"ids": {11: -2}}, "maps 11 to -2"),
        ({"ids": {-1: 0}}, "maps -1"),
        ({"ids": {"a": 0}}, "maps 'a'"),
        ({"ids": {3: 255}, "described": {"ids": {"0": 1, "1": 0}}}, "would replace all ids of classes.yaml"),
        ({"ids": {3: 255}, "described": {}}, "would replace all ids of classes.yaml"),
        ({"ids": {3: 255}, "described": {"ids": None}}, "would replace all ids of classes.yaml"),
        ({"format": "palette", "ignore_colors": [[255, 0, 0]]}, r"\(255, 0, 0\) is used twice"),
        ({"format": "palette", "ignore_colors": [[256, 0, 0]]}, r"Colour \[256, 0, 0\]"),
    ],
)
def test_invalid_mask_rules_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        MaskReader(LABELS, Masks(**arguments))


def test_overlapping_classes_have_no_black():
    colours = Labels.of(["a", "b", "c"], None, 255, has_layers=True).palette
    assert len(set(colours)) == 3 and (0, 0, 0) not in colours
    assert Labels.of(["a", "b"], None, 255).palette[0] == (0, 0, 0)
    given = Labels.of(["a", "b"], [[0, 0, 0], [9, 9, 9]], 255, has_layers=True)
    assert given.palette == ((255, 255, 255), (9, 9, 9))
    assert len(Labels.of(list(map(str, range(255))), None, 255, has_layers=True).palette) == 255


@pytest.mark.parametrize(
    ("classes", "palette", "ignore", "message"),
    [
        ([], None, 255, "0 names"),
        (["a"] * 256, None, 255, "256 names"),
        (["a", "b", "a"], None, 255, "names a more than once"),
        (["a", "b"], [[0, 0, 0]], 255, "1 colours for 2 classes"),
        (["a"], [[0, 0]], 255, r"Colour \[0, 0\]"),
        (["a"], [[0, 0, 0.5]], 255, "whole numbers"),
        (["a"], None, 256, "ignore_index=256"),
        (["a"], None, -1, "ignore_index=-1"),
    ],
)
def test_invalid_labels_are_refused(classes, palette, ignore, message):
    with pytest.raises(UserError, match=message):
        Labels.of(classes, palette, ignore)

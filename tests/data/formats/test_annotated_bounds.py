"""Shapes and names of annotation files that an attacker may choose: each is bounded by its image, or refused."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from dinoseg.data.annotation.coco import read_coco
from dinoseg.data.annotation.labelme import read_labelme

SIZE = (8, 10)


def png_mask(height, width):
    """Return a mask as LabelMe stores it."""
    file = io.BytesIO()
    Image.new("1", (width, height), 1).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def labelme(label="leaf", kind="polygon", points=((1, 1), (5, 1), (5, 4)), image="a.png", size=SIZE, **more):
    """Return the JSON text of a LabelMe file of one shape."""
    shape = {"label": label, "shape_type": kind, "points": points, **more}
    sides = {"imageHeight": size[0], "imageWidth": size[1]} if size else {}
    return json.dumps({"imagePath": image, "shapes": [shape], **sides})


def coco(label="leaf", image="a.png"):
    """Return the JSON text of a COCO file of one polygon."""
    images = [{"id": 1, "file_name": image, "height": SIZE[0], "width": SIZE[1]}]
    polygon = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 5, 1, 5, 4]]}
    return json.dumps({"images": images, "categories": [{"id": 1, "name": label}], "annotations": [polygon]})


def reason(text):
    """Return why the entry of a LabelMe file cannot be used."""
    return read_labelme(text.encode(), Path("a.json")).entries[0].wrong


@pytest.mark.parametrize("corners", [[[0, 0], [9, 8]], [[0, 0], [10, 7]], [[0.5, 0], [2, 2]], [[0, 0], [1, 1]]])
def test_labelme_masks_larger_than_the_image_are_refused(monkeypatch, corners):
    def fail(*_):
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr(Image.Image, "convert", fail)
    found = reason(labelme(kind="mask", points=corners, mask=png_mask(9, 11)))
    assert "11 x 9 pixels, but its image only 10 x 8" in found


def test_labelme_masks_need_the_size_of_the_image():
    mask = {"kind": "mask", "points": [[0, 0], [1, 1]], "mask": png_mask(2, 2)}
    assert "imageHeight and imageWidth" in reason(labelme(**mask, size=None)) and not reason(labelme(**mask))


def test_circles_far_larger_than_images_are_refused():
    assert "a radius above 262144 pixels" in reason(labelme(kind="circle", points=[[0, 0], [1e6, 1e6]]))
    assert not reason(labelme(kind="circle", points=[[0, 0], [1e5, 1e5]]))


@pytest.mark.parametrize("bad", ["\ud800", "leaf\udfff", "\udc80"])
def test_lone_surrogates_in_names_are_one_error(bad):
    for text in (coco(label=bad), coco(image=f"{bad}.png"), labelme(image=f"{bad}.png")):
        with pytest.raises(ValueError, match="valid Unicode|surrogate"):
            (read_coco if "categories" in text else read_labelme)(text.encode(), Path("a.json"))
    if bad == "\udc80":  # a byte of a file name: the file is read, its shape is not
        assert "valid Unicode" in reason(labelme(label=bad))
    else:
        with pytest.raises(ValueError, match="surrogate"):
            reason(labelme(label=bad))

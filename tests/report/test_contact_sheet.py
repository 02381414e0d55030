import numpy as np

from dinoseg.modes.select import contact_sheet


def test_pictures_of_any_size_lie_in_rows():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (9, 9, 9)]
    sizes = [(40, 60), (60, 40), (1, 1), (900, 30), (300, 400), (2, 700), (50, 50)]
    pictures = [
        (f"{n}", np.full((*size, 3), c, np.uint8)) for n, (c, size) in enumerate(zip(colours, sizes, strict=True))
    ]
    sheet = contact_sheet(pictures, columns=3)
    places = [np.argwhere((sheet == colour).all(axis=-1)).mean(axis=0) for colour in colours]
    rows = [[round(places[n][0] / sheet.shape[0] * 3 - 0.5) for n in row] for row in ((0, 1, 2), (3, 4, 5), (6,))]
    assert rows == [[0, 0, 0], [1, 1, 1], [2]]
    assert places[0][1] < places[1][1] < places[2][1] and abs(places[3][1] - places[0][1]) < 40
    assert contact_sheet(pictures[:1]).shape[1] < contact_sheet(pictures[:2]).shape[1]


def test_a_long_name_shows_its_end():
    picture = np.full((30, 30, 3), 128, np.uint8)
    long = contact_sheet([("a" + "/c" * 300 + "end", picture)])
    assert (long == contact_sheet([("b" + "/c" * 300 + "end", picture)])).all() and long.shape[1] < 1000
    other = contact_sheet([("a" + "/c" * 300 + "ends", picture)])
    assert other.shape != long.shape or (other != long).any()

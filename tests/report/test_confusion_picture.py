import numpy as np
import pytest

from dinoseg.evaluation.images import confusion_picture


@pytest.mark.parametrize("num_classes", [1, 2, 10, 60])
def test_draws_any_number_of_classes_without_cutting(num_classes):
    rng = np.random.default_rng(0)
    matrix = rng.integers(0, 10**9, (num_classes, num_classes))
    matrix[num_classes // 2] = 0
    names = [f"class {index} " + "x" * (index % 30) for index in range(num_classes)]
    picture = confusion_picture(matrix.tolist(), names)
    assert picture.dtype == np.uint8 and picture.ndim == 3
    frame = np.concatenate([picture[:5].reshape(-1, 3), picture[-5:].reshape(-1, 3)])
    sides = np.concatenate([picture[:, :5].reshape(-1, 3), picture[:, -5:].reshape(-1, 3)])
    assert (frame == 255).all() and (sides == 255).all()


def test_rows_are_normalised_and_empty_rows_are_not_zero():
    full = confusion_picture([[10, 0], [0, 10]], ["a", "b"])
    scaled = confusion_picture([[10**12, 0], [0, 3]], ["a", "b"])
    empty = confusion_picture([[10, 0], [0, 0]], ["a", "b"])
    assert np.array_equal(full, scaled)
    assert not np.array_equal(full, empty)


def test_pyplot_stays_out_of_it():
    import subprocess
    import sys

    code = (
        "import sys; from dinoseg.evaluation.images import confusion_picture as draw; draw([[1]], ['a']);"
        "from dinoseg.report.curves import draw_curves; sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_names_must_fit():
    with pytest.raises(ValueError, match="does not match 1 class names"):
        confusion_picture([[1, 2], [3, 4]], ["a"])

"""Objects of images from the same passes of the model that predict the classes of pixels."""

from collections.abc import Sequence

from torch import Tensor

from dinoseg.core.objects import Objects
from dinoseg.core.shapes import Prediction
from dinoseg.core.task import ObjectTask, Task
from dinoseg.inference.strategy import Place

Size = tuple[int, int]  # (H, W)


class ObjectCollector:
    """Callback of an inference strategy, its `on_pass`, that collects the objects of a batch of images.

    A single pass over whole images predicts their objects directly. Those of windows are joined by the task. If the
    images are resized before, a window of the resized image stands for the rounded part of the predicted size.

    Args:
        task: of the model.
        count: number of images in the batch.
        size: (H, W) to predict at.
    """

    def __init__(self, task: Task, count: int, size: Size) -> None:
        self.task, self.count, self.size = task, count, size
        self.clear()

    def clear(self) -> None:
        """Forget the objects of a batch, as of an attempt that ran out of memory."""
        self._parts: list[list[tuple[Objects, int, int]]] = [[] for _ in range(self.count)]

    def __call__(self, prediction: Prediction, images: Tensor, places: Sequence[Place], image_size: Size) -> None:
        """Add the objects of a pass over parts (n, C, h, w) of images of `image_size` (H, W)."""
        for number, (image, top, left) in enumerate(places):
            rows = self._scale(0, top, images.shape[-2], image_size)
            columns = self._scale(1, left, images.shape[-1], image_size)
            size = (len(rows), len(columns))
            objects = prediction.of_images(slice(number, number + 1)).objects(size)[0]
            self._parts[image].append((objects, rows.start, columns.start))

    def _scale(self, axis: int, start: int, length: int, image_size: Size) -> range:
        """Return the pixels of the predicted size, at least one, of a part of images along an axis."""
        factor = self.size[axis] / image_size[axis]
        first = min(round(start * factor), self.size[axis] - 1)
        return range(first, max(first + 1, round((start + length) * factor)))

    def objects(self) -> list[Objects]:
        """Return the objects of each image, of an `ObjectTask`."""
        assert isinstance(self.task, ObjectTask)
        return [parts[0][0] if len(parts) == 1 else self.task.join_objects(parts, self.size) for parts in self._parts]

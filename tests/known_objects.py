"""Images whose objects are known, and a model that predicts given objects: evaluations of objects without training."""

import json

import numpy as np
import torch
from drawn_objects import encode
from torch import nn

from dinoseg.core.geometry import upsample
from dinoseg.core.object_ids import OBJECTS, encode_object, stack_objects
from dinoseg.core.objects import Objects
from dinoseg.core.sample_maps import ObjectMap
from dinoseg.core.shapes import MaskOutputs, Prediction
from dinoseg.extensions.objects.tasks import InstanceTask, PanopticTask
from dinoseg.training.engine import Engine
from dinoseg.training.validation import evaluate


class KnownImages:
    """A dataset of drawn references: (mask (H, W), [(mask of an object, class, crowd)]) of each image."""

    ignore_index = 255

    def __init__(self, images, num_classes, things):
        self.images = images
        self.classes = [f"class {number}" for number in range(num_classes)]
        self.palette = [(number, 0, 0) for number in range(num_classes)]
        self.names = [f"p{number:03}" for number in range(len(images))]
        self.maps = {OBJECTS: ObjectMap(things=tuple(things))}

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        mask, objects = self.images[index]
        values = [
            (encode_object(number, label, crowd=crowd), np.flatnonzero(pixels))
            for number, (pixels, label, crowd) in enumerate(objects, 1)
        ]
        maps = {OBJECTS: torch.from_numpy(stack_objects(values, mask.shape))}
        image = torch.full((3, *mask.shape), index, dtype=torch.uint8)
        return {"image": image, "mask": torch.from_numpy(mask), "name": self.names[index], "maps": maps}


class KnownTask:
    """Finds the objects of the image whose number is the class logit, cut at the size that is asked for."""

    known = ()

    def find_objects(self, class_logits, mask_logits, size, valid):
        found = [self.known[int(number)] for number in class_logits[:, 0, 0]]
        assert all(each.size == size for each in found)
        return found


class KnownInstances(KnownTask, InstanceTask):
    """Instances."""


class KnownSegments(KnownTask, PanopticTask):
    """Segments."""


class KnownModel(nn.Module):
    """A model whose outputs hold the number of each image, which is the value of its pixels."""

    longest = None

    def __init__(self, task, num_classes):
        super().__init__()
        self.task, self.num_classes = task, num_classes

    def forward(self, images):
        size = (images.shape[-2], images.shape[-1])
        numbers = images[:, :1, 0, 0].float()[..., None]
        grid = torch.zeros(len(images), self.num_classes, 1, 1)
        outputs = MaskOutputs(numbers, torch.zeros(len(images), 1, 1, 1))
        return Prediction(outputs, size, (1.0, 1.0), lambda *_: grid, grid=grid, task=self.task)


def evaluate_known(data, predicted, kind, rows, *, batch_size=2, **options):
    """Return the scores of `evaluate` for the predicted objects of each image."""
    things = [data.classes[label] for label in data.maps[OBJECTS].things]
    task = kind(data.classes, things)
    task.known = predicted
    engine = Engine("cpu", precision="fp32", workers=0, eval_batch_size=batch_size)
    return evaluate(KnownModel(task, len(data.classes)), data, engine, rows=rows, **options)


def write_instance_files(folder, data, predicted):
    """Write the references and predictions as COCO's gt.json and results.json."""
    annotations, results = [], []
    for number, (_, objects) in enumerate(data.images):
        for mask, label, crowd in sorted((each for each in objects if each[0].any()), key=lambda each: each[2]):
            entry = {"image_id": number, "category_id": label + 1, "segmentation": encode(mask)}
            annotations.append({**entry, "id": len(annotations) + 1, "area": int(mask.sum()), "iscrowd": int(crowd)})
        found = predicted[number]
        for mask, label, score in zip(found.masks, found.classes.tolist(), found.scores.tolist(), strict=True):
            entry = {"image_id": number, "category_id": label + 1, "segmentation": encode(mask.to_mask(found.size))}
            results.append({**entry, "score": score})
    images = [
        {"id": number, "height": mask.shape[0], "width": mask.shape[1], "file_name": f"{data.names[number]}.jpg"}
        for number, (mask, _) in enumerate(data.images)
    ]
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(data.classes)]
    reference = {"images": images, "categories": categories, "annotations": annotations}
    for name, content in (("gt", reference), ("results", results)):
        (folder / f"{name}.json").write_text(json.dumps(content))


def draw_known_instances(seed):
    """Return a dataset and predicted instances: some images have no objects or only crowds; masks overlap and tie."""
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(1, 5))
    images, predicted = [], []
    for _ in range(rng.integers(1, 7)):
        size = tuple(rng.choice([9, 40, 130], 2).tolist())
        count = int(rng.choice([0, 1, 5]))
        only_crowds = rng.random() < 0.15
        objects = [
            (_draw_rectangle(rng, size), int(rng.integers(num_classes)), bool(only_crowds or rng.random() < 0.2))
            for _ in range(count)
        ]
        masks, labels, scores = [], [], []
        for _ in range(rng.choice([0, 6, 130], p=[0.2, 0.7, 0.1])):
            mask = _draw_rectangle(rng, size)
            label = int(rng.integers(num_classes))
            if objects and rng.random() < 0.7:
                near = objects[rng.integers(count)]
                mask = near[0] & (rng.random(size) < rng.choice([0.55, 0.8, 1]))
                label = near[1]
            masks.append(mask)
            labels.append(label)
            scores.append(float(rng.choice([0.2, 0.5, rng.random()])))
        order = np.argsort(-np.array(scores), kind="stable")
        stacked = np.array(masks, bool).reshape(len(masks), *size)
        predicted.append(Objects.of_masks(stacked[order], np.array(labels, int)[order], np.array(scores)[order]))
        images.append((rng.integers(0, num_classes, size).astype(np.uint8), objects))
    return KnownImages(images, num_classes, range(num_classes)), predicted


def _draw_rectangle(rng, size):
    mask = np.zeros(size, bool)
    top, left = (int(rng.integers(-3, side)) for side in size)
    height, width = (int(rng.integers(1, side + 1)) for side in size)
    mask[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)] = True
    return mask


class BrightestClass(InstanceTask):
    """A task that finds one object: the pixels whose most probable class is 1."""

    def find_objects(self, class_logits, mask_logits, size, valid):
        shares = class_logits.float().softmax(dim=-1)[..., : self.num_classes]
        pixels = torch.einsum("bqk,bqhw->bkhw", shares, upsample(mask_logits, size, valid).float().sigmoid())
        masks = (pixels.argmax(dim=1, keepdim=True) == 1).cpu().numpy()
        return [Objects.of_masks(mask, [1], [0.9]) for mask in masks]

    def join_objects(self, parts, size):
        whole = np.zeros((1, *size), bool)
        for objects, top, left in parts:
            mask = objects.masks[0].to_mask(objects.size)
            whole[0, top : top + mask.shape[0], left : left + mask.shape[1]] |= mask
        return Objects.of_masks(whole, [1], [0.9])


class BrightestSegment(PanopticTask):
    """The same with a segment of stuff, all other pixels."""

    def find_objects(self, class_logits, mask_logits, size, valid):
        found = BrightestClass.find_objects(self, class_logits, mask_logits, size, valid)
        return [
            Objects.of_masks(np.stack([mask, ~mask]), [1, 0], [0.9, 0.8])
            for mask in (each.masks[0].to_mask(size) for each in found)
        ]

"""A dataset whose maps are functions of its masks, and a loss that compares them."""

import torch
from making import Pictures

from dinoseg.core.contracts import Loss
from dinoseg.core.sample_maps import DistanceMap, IdMap, LabelMap, ValueMap

KINDS = {"twin": LabelMap(), "ids": IdMap(), "distance": DistanceMap(), "values": ValueMap(layers=2, fill=-3.0)}
FAR = 2**40  # IDs that a float or an int32 cannot hold


def maps_of(sample):
    """Return maps that are known from the mask (H, W) of a sample."""
    mask = sample["mask"]
    rows = torch.arange(float(mask.shape[0]))[:, None].expand(mask.shape)
    return {
        "twin": mask.clone(),
        "ids": torch.where(mask == 255, 0, mask.long() + FAR),
        "distance": rows - 7.5,
        "values": torch.stack([mask.float(), rows]),
    }


def check_twins(batch):
    """Check label and ID maps against the masks of a batch."""
    assert set(batch.maps) == set(KINDS) and len(batch.maps["twin"]) == len(batch.names)
    assert torch.equal(batch.maps["twin"], batch.mask)
    assert torch.equal(batch.maps["ids"], torch.where(batch.mask == 255, 0, batch.mask.long() + FAR))


class MappedPictures(Pictures):
    """`Pictures` with maps."""

    maps = KINDS

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample | {"maps": maps_of(sample)}


class MappedLoss(Loss):
    """Mean over labelled pixels of costs that depend on all maps; it checks each batch that it gets."""

    needs_maps = KINDS
    num_divisors = 2

    def __init__(self):
        super().__init__()
        self.batches = 0

    def forward(self, prediction, batch):
        check_twins(batch)
        self.batches += 1
        labelled = batch.mask != 255
        shares = prediction.logits(batch.mask.shape[-2:]).softmax(1)
        costs = (shares[:, 1] * batch.maps["distance"] + shares[:, 2] * batch.maps["values"][:, 0]) * labelled
        return costs.sum() / labelled.sum().clamp(min=1), {}

    def divisors(self, batch):
        check_twins(batch)  # not completed yet, where features are cached
        return torch.stack([(batch.mask != 255).sum(), (batch.maps["twin"] != 255).sum()]).float()

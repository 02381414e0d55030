"""Classes of one view pasted on another."""

import numpy as np
import torch

from dinoseg.core.shapes import Sample


def class_mixed(source: Sample, onto: Sample, ignore_index: int, chance: np.random.Generator) -> Sample:
    """Return a view with half of the classes of another of its size pasted on it, pixels and ids.

    ClassMix (Olsson et al., arXiv 2007.07936, section 3.1), of true masks: half is rounded up, and ignored pixels are
    of no class, so they stay where they are and cover nothing.
    """
    present = source["mask"].unique().numpy()
    present = present[present != ignore_index]
    chosen = torch.from_numpy(chance.choice(present, -(-len(present) // 2), replace=False))
    pasted = torch.isin(source["mask"], chosen)
    return Sample(
        image=torch.where(pasted, source["image"], onto["image"]),
        mask=torch.where(pasted, source["mask"], onto["mask"]),
        name=f"{onto['name']} with classes of {source['name']}",
    )

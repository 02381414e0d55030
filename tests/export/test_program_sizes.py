import pytest
import torch

from dinoseg.export.graph import record_of, trace
from dinoseg.export.options import GraphOptions
from dinoseg.models.backbones.rgb import RgbBackbone
from dinoseg.models.heads.detail import DetailHead
from dinoseg.models.model import SegmentationModel


@pytest.mark.heavy
def test_program_accepts_even_and_odd_numbers_of_patches(patch_size=14):
    """Patches of 14 px, as DINOv2 has, fill cells of 4 px where their number is even, and else do not."""
    torch.manual_seed(0)
    backbone = RgbBackbone(patch_size)
    head = DetailHead(backbone.dim, backbone.num_layers, 3, patch_size, fine=4, width=8, linear_skip=True)
    model = SegmentationModel(backbone, head).eval()
    record, _ = record_of(model, None, GraphOptions(), (32, 32))
    program = trace(model, record).module()
    for rows, columns in ((3, 5), (2, 4), (3, 4), (4, 3)):
        images = torch.rand(1, 3, rows * patch_size, columns * patch_size)
        with torch.no_grad():
            torch.testing.assert_close(program(images)[0], model(images).outputs)

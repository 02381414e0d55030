"""Options of heads that do not fit are refused by key, value and remedy."""

from functools import partial

from eomt_making import pair
from mistakes import refusals

from dinoseg.core.contracts import Backbone
from dinoseg.extensions.query_heads.eomt import EomtHead
from dinoseg.extensions.query_heads.mask2former.head import Mask2FormerHead
from dinoseg.extensions.slots.head.head import SlotHead
from dinoseg.models.heads.cnn import CnnHead
from dinoseg.models.heads.detail import DetailHead
from dinoseg.models.heads.dpt import DptHead
from dinoseg.models.heads.linear import LinearHead
from dinoseg.models.heads.mlp import MlpHead
from dinoseg.models.heads.upernet import UperNetHead
from dinoseg.models.model import SegmentationModel

HEADS = {
    "cnn": partial(CnnHead, in_dim=5, num_layers=1, num_classes=3, patch_size=14, channels=32),
    "detail": partial(DetailHead, in_dim=3, num_layers=1, num_classes=3, patch_size=8),
    "dpt": partial(DptHead, in_dim=12, num_layers=4, num_classes=3, features=6),
    "eomt": partial(EomtHead, in_dim=24, num_layers=1, num_classes=4, patch_size=16, blocks=2, num_queries=5),
    "linear": partial(LinearHead, in_dim=8, num_layers=1, num_classes=3),
    "mask2former": partial(Mask2FormerHead, in_dim=384, num_layers=4, num_classes=2),
    "mlp": partial(MlpHead, in_dim=8, num_layers=1, num_classes=3, patch_size=14),
    "slots": partial(SlotHead, in_dim=6, num_layers=1, num_slots=3, positions_grid=[3, 4]),
    "upernet": partial(UperNetHead, in_dim=12, num_layers=4, num_classes=3, channels=6),
}

ONE_GRID = ("gets 2 maps of a pyramid", "layers=[-1]", "dpt or upernet")
MULTIPLE = "must be a multiple of 32 (groups of channels) and of nu"
SHARES = "0 <= start <= end <= 1"
ALWAYS = {"groups": "always"}
CHOICES = {
    "groups": "off, initial, always",
    "mask_source": "attention, alpha",
    "slot_init": "gaussian, clusters, learned",
    "predictor": "savi, transformer, carry, none",
    "time_decoder": "none, linear, attention",
    "decoder": "mlp, slot_mixer",
    "positions": "learned, sine, linear, added",
    "similarity_of": "features, keys",
}
test_message_names_value_and_remedy = refusals(
    {
        f"{head} {options}": (partial(HEADS[head], **options), *words)
        for head, options, *words in (
            ("cnn", {"in_dim": [4, 8], "num_layers": 2}, "head cnn ", *ONE_GRID),
            ("cnn", {"num_blocks": 5}, "num_blocks=5: ", "Give a number from 1 to 4"),
            ("cnn", {"pixel_shuffle": 4}, "pixel_shuffle=4: ", "Give a number from 0 to 3"),
            ("cnn", {"kernel_size": 4}, "kernel_size=4: only an odd kernel preserves"),
            ("cnn", {"activation": "gelu"}, "activation=gelu is unknown. Choose one of relu, leakyrelu, sigmoid, tanh"),
            ("cnn", {"dropout": 1.0}, "dropout=1.0 ", "below 1"),
            ("detail", {"patch_size": 7}, "patch_size=7 ", "even patch size"),
            ("detail", {"fine": 0}, "fine=0 ", " at least 1"),
            ("detail", {"blocks": -1}, "blocks=-1 ", " at least 0"),
            ("dpt", {"in_dim": 6, "num_layers": 5}, "head dpt reads four feature maps, but num_layers=5. ", "quarters"),
            ("dpt", {"features": 0}, "features=0 ", "at least 1"),
            ("dpt", {"out_channels": [8, 8, 8]}, "out_channels=[8, 8, 8]: give four numbers"),
            ("dpt", {"out_channels": [8, 8, 8.5, 8]}, "out_channels=[8, 8, 8.5, 8] ", "list of whole numbers"),
            ("dpt", {"dropout": 1.5}, "dropout=1.5 ", "below 1"),
            ("eomt", {"blocks": 0}, "blocks=0 ", "at least 1"),
            ("eomt", {"anneal": "never"}, "anneal=never: give even"),
            ("eomt", {"anneal": [[0, 1]]}, "anneal=[[0, 1]]: ", "each of blocks=2 blocks"),
            ("eomt", {"anneal": [[0, 1], [0.6, 0.5]]}, SHARES),
            ("eomt", {"anneal": [[0, 1], [0.5, 1.5]]}, SHARES),
            ("eomt", {"anneal": [[0, float("nan")], [0.5, 1]]}, "anneal=", "finite number"),
            ("eomt", {"anneal": [[0, 1], [1, 1]]}, "Write shares of 0 and 1 as 0.0 and 1.0: whole numbers are steps"),
            ("eomt", {"anneal": [[5, 4], [5, 9]]}, "start <= end as whole numbers"),
            ("eomt", {"anneal": [[0, 400], [0.5, 1.0]]}, "anneal=", " mixes optimizer steps"),
            ("eomt", {"anneal": [[0, 1], [0.1, 0.2, 0.3]]}, SHARES),
            ("linear", {"init": "zeros"}, "init=zeros is unknown. Choose one of probe, normal or None"),
            ("linear", {"dropout": 1.0}, "dropout=1.0 ", "at least 0 and below 1"),
            ("mask2former", {"num_layers": 1}, "exactly 4 feature maps, but num_layers=1. Set layers=quarters"),
            (
                "mask2former",
                {"in_dim": [96, 192, 384, 768]},
                "the widths [96, 192, 384, 768], but this Mask2Former head",
            ),
            ("mask2former", {"num_heads": 7}, "num_heads=7 does not divide 192, half of the backbone's width 384. Ch"),
            ("mask2former", {"in_dim": 24}, "half of the backbone's width 24. Choose one of 1, 2, 3, 4, 6, 12."),
            ("mask2former", {"in_dim": 160, "hidden_dim": 80}, "hidden_dim=80 ", MULTIPLE),
            ("mask2former", {"in_dim": 160, "hidden_dim": 100}, "Choose hidden_dim=96 or 128."),
            ("mask2former", {"in_dim": 192, "num_heads": 12, "hidden_dim": 64}, "Choose hidden_dim=96 or 192."),
            ("mask2former", {"num_heads": 0}, "num_heads=0 "),
            ("mask2former", {"class_layer": "old"}, "class_layer=old is unknown. Choose one of loaded, new."),
            ("mask2former", {"drop_path": 1.0}, "drop_path=1.0 "),
            ("mask2former", {"trainable": "head"}, "trainable=head is unknown. Choose one of all, class_embed."),
            ("mask2former", {"class_layer": "new"}, "class_layer=new without weights: ", " Leave class_layer out"),
            ("mask2former", {"trainable": "class_embed"}, "class_embed without weights: ", "or set trainable=all"),
            ("mlp", {"in_dim": [4, 8], "num_layers": 2}, "head mlp ", *ONE_GRID),
            ("slots", {"in_dim": 384, "num_layers": 4}, "num_layers=4. Set layers=[-1]"),
            ("slots", {"num_slots": 0}, "num_slots=0: give at least 1 slot"),
            ("slots", {"num_slots": [5, 0], **ALWAYS}, "num_slots=[5,0]: give at least 1"),
            ("slots", {"num_slots": [5, 5]}, "num_slots=[5,5] with groups=off", "num_slots=10, or set groups"),
            ("slots", {"num_slots": 10, "groups": "initial"}, "num_slots=10 with groups=initial", "num_slots=[5,5]"),
            *(("slots", {key: "gru"}, f"{key}=gru is unknown. Choose one of {CHOICES[key]}") for key in CHOICES),
            ("slots", {"iterations": 0}, "iterations=0 ", "at least 1"),
            ("slots", {"positions_grid": [28]}, "positions_grid=[28]: give rows and columns"),
            ("slots", {"positions_grid": None}, "positions=learned needs the grid ", "positions_grid=null"),
            (
                "slots",
                {"positions_grid": None, "positions": "linear", "similarity": True},
                "similarity=true needs the grid",
            ),
            (
                "upernet",
                {"in_dim": [4, 8], "num_layers": 2},
                "head upernet reads four feature maps, but num_layers=2. ",
            ),
            ("upernet", {"channels": 0}, "channels=0 ", "at least 1"),
        )
    }
    | {
        "groups without a class token": (
            lambda: HEADS["slots"](num_slots=[2, 3], **ALWAYS).check_backbone(Backbone()),
            *("groups=always needs a backbone with a class token", "groups=off"),
        ),
        "EoMT of too many blocks": (
            lambda: SegmentationModel(*pair(blocks=4)),
            "blocks=4: this backbone reads 3 blocks; give 1 to 3",
        ),
        "EoMT without tokens": (
            lambda: pair()[1].check_backbone(Backbone()),
            *("EoMT and PMT need", "dinov2_", "dinov3_vit", "vit_small_patch16_224", "mask2former"),
        ),
        "EoMT on a pyramid": (lambda: EomtHead([96, 192], 2, 4, patch_size=16), "EoMT and PMT need"),
    }
)

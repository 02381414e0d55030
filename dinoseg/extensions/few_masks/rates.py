"""Learning rates that lag a step behind their schedule."""

from dinoseg.training.optim import Schedule, ScheduleKind, schedule
from dinoseg.utils.ranges import NotNegative, Share


def lagging_schedule(
    kind: ScheduleKind = "poly",
    *,
    warmup: NotNegative = 0,
    warmup_start: Share | None = None,
    warmup_decays: bool = False,
    backbone_warmup: NotNegative | None = None,
    power: NotNegative = 0.9,
    min_lr_ratio: Share = 0.0,
) -> Schedule:
    """Return `dinoseg.training.optim.schedule` with the factor of step 0 in the first two steps.

    UniMatch V2 sets the rate of step i after the update of step i (LiheYoung/UniMatch-V2, unimatch_v2.py).
    """
    factor = schedule(
        kind,
        warmup=warmup,
        warmup_start=warmup_start,
        warmup_decays=warmup_decays,
        backbone_warmup=backbone_warmup,
        power=power,
        min_lr_ratio=min_lr_ratio,
    )

    def lagging(step: int, steps: int, backbone: bool = False, /) -> float:
        return factor(max(0, step - 1), steps, backbone)

    return lagging

"""What a report tells of confidence: reliability, expected calibration error and a fitted temperature."""

from collections.abc import Mapping, Sequence
from typing import Any

from dinoseg.report.html.charts import Axes, around, bar_chart, line_chart
from dinoseg.report.html.page import paragraph, percent
from dinoseg.report.html.tables import number_cell, plain_cell, table
from dinoseg.utils.wording import count_of

_LEAST = 20  # pixels of a bin that is drawn


def calibration_section(found: Mapping[str, Any] | None) -> str:
    """Return what is known of confidence.

    Args:
        found: `pixels` and `images` that were sampled, `temperature`, and of `before` and `after` it: `nll`, `ece`, and
            `bins`: pixels, correct ones and the sum of confidences of each. None: nothing is labelled, or one class.
    """
    if found is None:
        return paragraph("None: it needs labelled pixels of two classes or more.")
    limit = " (the end of the range that is searched)" if not 0.0101 < found["temperature"] < 99 else ""
    note = paragraph(
        f"Over {found['pixels']:,} labelled pixels, evenly spaced in {count_of(found['images'], 'image')}. Confidence "
        "is the probability of the predicted class. ECE is the mean gap between confidence and accuracy over 15 bins "
        f"of equal width, weighted by pixels (bins of fewer than {_LEAST} are not drawn); NLL is the mean negative "
        "log-likelihood of the reference, in nats. The temperature, by which logits are divided, is fitted on these "
        "same pixels: it says how far this model is from calibrated here, and is no result on held-out data."
    )
    states = (("as it is", found["before"]), (f"at temperature {found['temperature']:.3g}", found["after"]))
    curves = [(name, _reliable(state["bins"])) for name, state in states]
    chart = line_chart("Reliability", curves, Axes((0, 1), (0, 1), "confidence", "accuracy"), ideal=True)
    heads = [("logits", "text"), ("NLL", "number"), ("ECE %", "number")]
    rows = [
        [
            plain_cell(name),
            number_cell(state["nll"], f"{state['nll']:.4f}"),
            number_cell(state["ece"], percent(state["ece"], 2)),
        ]
        for name, state in states
    ]
    temperature = paragraph(f"Fitted temperature: {found['temperature']:.3f}{limit}.", kind="dim")
    shares = [100 * row[0] / found["pixels"] for row in found["before"]["bins"]]
    bins = bar_chart(
        "Confidence as it is",
        [place / len(shares) for place in range(len(shares) + 1)],
        shares,
        Axes((0, 1), (0, around(shares, zero=True)[1]), "confidence", "% of pixels"),
    )
    return note + table(heads, rows) + temperature + f'<div class="charts">{chart}{bins}</div>'


def _reliable(bins: Sequence[tuple[int, int, float]]) -> list[tuple[float, float]]:
    """Return mean confidence and accuracy of the bins that hold enough pixels."""
    return [(confidence / pixels, correct / pixels) for pixels, correct, confidence in bins if pixels >= _LEAST]

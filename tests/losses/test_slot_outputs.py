import pytest
from command_line import SLOTS, call

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("words", "given", "remedy"),
    [
        (
            ["loss=temporal_similarity", "head.similarity=true"],
            "head.reconstruct=true does not fit loss=temporal_similarity",
            "Set head.reconstruct=false head.output_norm=false, or choose loss=video_similarity.",
        ),
        (
            ["loss=video_similarity", "head.similarity=true", "head.reconstruct=false", "head.output_norm=false"],
            "head.reconstruct=false does not fit loss=video_similarity",
            "Set head.reconstruct=true, or choose loss=temporal_similarity.",
        ),
        (
            ["loss=feature_reconstruction", "head.similarity=true"],
            "head.similarity=true does not fit loss=feature_reconstruction",
            "Set head.similarity=false, or choose loss=video_similarity.",
        ),
        (
            ["loss=video_similarity"],
            "head.similarity=false does not fit loss=video_similarity",
            "Set head.similarity=true, or choose loss=feature_reconstruction or slot_contrast.",
        ),
    ],
)
def test_outputs_of_the_head_fit_the_loss(tmp_path, words, given, remedy):
    done = call(tmp_path, "mode=plan", *SLOTS[1:], *words)
    assert done.status == 1 and f"{given}. {remedy}" in " ".join(done.err.split())

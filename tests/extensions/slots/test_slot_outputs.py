import pytest
from command_line import SLOTS, call

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("loss", "keys", "given", "remedy"),
    [
        (
            *("temporal_similarity", ["similarity=true"], "reconstruct=true"),
            "head.reconstruct=false head.output_norm=false, or choose loss=video_similarity",
        ),
        pytest.param(
            *("video_similarity", ["similarity=true", "reconstruct=false", "output_norm=false"], "reconstruct=false"),
            "head.reconstruct=true, or choose loss=temporal_similarity",
            marks=pytest.mark.heavy,
        ),
        pytest.param(
            *("video_similarity", [], "similarity=false"),
            "head.similarity=true, or choose loss=feature_reconstruction or slot_contrast",
            marks=pytest.mark.heavy,
        ),
    ],
)
def test_outputs_of_the_head_fit_the_loss(tmp_path, loss, keys, given, remedy):
    done = call(tmp_path, "mode=plan", *SLOTS[1:], f"loss={loss}", *(f"head.{key}" for key in keys))
    said = " ".join(done.err.split())
    assert done.status == 1 and f"head.{given} does not fit loss={loss}. Set {remedy}." in said

import pytest

from dinoseg.experiment.heads import named_heads
from dinoseg.utils.errors import UserError


def of(heads, rates=None):
    return [(run.name, run.option, dict(run.keys), run.rate) for run in named_heads(heads, rates)]


def test_without_rates_each_has_its_own():
    assert of(["linear", {"head": "cnn", "channels": 128, "name": "small"}, {"head": "mlp", "lr": 1e-4}]) == [
        ("linear", "linear", {}, None),
        ("small", "cnn", {"channels": 128}, None),
        ("mlp", "mlp", {}, 1e-4),
    ]


def test_each_is_trained_at_each_rate_but_those_with_one():
    found = of(["linear", {"head": "mlp", "lr": 0.5}, {"head": "cnn", "name": "deep"}], [1e-3, 1])
    assert [(name, rate) for name, _, _, rate in found] == [
        *(("linear_0.001", 1e-3), ("linear_1", 1)),
        ("mlp", 0.5),
        *(("deep_0.001", 1e-3), ("deep_1", 1)),
    ]
    assert [name for name, *_ in of(["linear"], [1e-3])] == ["linear"]


@pytest.mark.parametrize(
    ("heads", "rates", "message"),
    [
        ("linear", None, r"heads=linear: give a list"),
        ([], None, "at least one head"),
        ([3], None, "3 is neither a head nor a head with settings"),
        ([{"channels": 3}], None, "is neither a head nor"),
        (["linear", "linear"], None, "linear occurs more than once. Give each a name"),
        (["linear"], [1e-3, 1e-3], "linear_0.001 occurs more than once"),
        ([{"head": "linear", "name": "../up"}], None, "the name ../up is not a valid folder name"),
        ([{"head": "linear", "name": ".hidden"}], None, "not a valid folder name"),
        ([{"head": "linear", "name": "n" * 101}], None, "not a valid folder name"),
        ([{"head": "linear", "lr": 0}], None, "lr=0 of linear is not a learning rate"),
        ([{"head": "linear", "lr": "fast"}], None, "lr=fast of linear is not a learning rate"),
        ([{"head": "linear", "lr": 1e20}], None, r"lr=1e\+20 of linear .* Give a number above 0 and at most 100"),
        (["linear"], [0.1, 1e20], r"lrs=\[0.1, 1e\+20\]: give a list of learning rates above 0 and at most 100"),
        (["linear"], [0.1, -1], r"lrs=\[0.1, -1\]: give a list of learning rates above 0"),
        (["linear"], [float("nan")], "give a list of learning rates above 0"),
        (["linear"], [True], "give a list of learning rates above 0"),
        (["linear"], [], "give a list of learning rates above 0"),
        (["linear"], 0.1, "give a list of learning rates above 0"),
    ],
)
def test_invalid_heads_are_refused(heads, rates, message):
    with pytest.raises(UserError, match=message):
        named_heads(heads, rates)

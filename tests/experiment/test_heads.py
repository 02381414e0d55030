import pytest
from mistakes import refusals

from dinoseg.experiment.heads import named_heads


@pytest.mark.parametrize(
    ("heads", "rates", "named"),
    [
        (
            ["linear", {"head": "cnn", "channels": 128, "name": "small"}, {"head": "mlp", "lr": 1e-4}],
            None,
            [("linear", "linear", {}, None), ("small", "cnn", {"channels": 128}, None), ("mlp", "mlp", {}, 1e-4)],
        ),
        (["linear"], [1e-3], [("linear", "linear", {}, 1e-3)]),
        (
            [{"head": "mlp", "lr": 0.5}, {"head": "cnn", "name": "deep"}],
            [1e-3, 1],
            [("mlp", "mlp", {}, 0.5), ("deep_0.001", "cnn", {}, 1e-3), ("deep_1", "cnn", {}, 1)],
        ),
    ],
)
def test_heads_are_trained_at_their_own_rate_or_at_each(heads, rates, named):
    assert [(run.name, run.option, dict(run.keys), run.rate) for run in named_heads(heads, rates)] == named


def parse(heads, rates=None):
    return lambda: named_heads(heads, rates)


def parse_linear(**keys):
    return parse([{"head": "linear", **keys}])


LIST = "give a list of learning rates above 0"
test_message_names_value_and_remedy = refusals(
    {
        "no list": (parse("linear"), "heads=linear: give a list"),
        "empty list": (parse([]), "at least one head"),
        "a number": (parse([3]), "3 is neither a head nor a head with settings"),
        "settings alone": (parse([{"channels": 3}]), "is neither a head nor"),
        "a head twice": (parse(["linear", "linear"]), "linear occurs more than once. Give each a name"),
        "a rate twice": (parse(["linear"], [1e-3, 1e-3]), "linear_0.001 occurs more than once"),
        "a name that leads out": (parse_linear(name="../up"), "the name ../up is not a valid folder name"),
        "a hidden name": (parse_linear(name=".hidden"), "not a valid folder name"),
        "a long name": (parse_linear(name="n" * 101), "not a valid folder name"),
        "rate 0": (parse_linear(lr=0), "lr=0 of linear is not a learning rate"),
        "rate of text": (parse_linear(lr="fast"), "lr=fast of linear is not a learning rate"),
        "large rate": (parse_linear(lr=1e20), "lr=1e+20 of linear ", "Give a number above 0 and at most 100"),
        "large rates": (parse(["linear"], [0.1, 1e20]), f"lrs=[0.1, 1e+20]: {LIST} and at most 100"),
        "rate below 0": (parse(["linear"], [0.1, -1]), f"lrs=[0.1, -1]: {LIST}"),
        **{f"rates {rates}": (parse(["linear"], rates), LIST) for rates in ([float("nan")], [True], [], 0.1)},
    }
)

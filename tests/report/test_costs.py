from dinoseg.modes.compare import costs_table

ROWS = [
    dict(run="a", miou=0.75, accuracy=0.9, parameters=22_000_000, trainable=10_000, seconds=0.5, memory_gib=2.0),
    dict(run="b", miou=0.5, accuracy=0.8, parameters=300_000_000, trainable=None, seconds=0.0125, memory_gib=None),
    dict(run="c", miou=None, accuracy=None, parameters=None, trainable=None, seconds=None, memory_gib=None),
]


def test_costs_table_shows_known_values():
    said = costs_table(ROWS)
    assert "75.00" in said and "300,000,000" in said and "0.0125" in said and said.splitlines()[-1].count("-") == 6
    assert "GiB" not in costs_table(ROWS[1:]) and "mIoU" in costs_table(ROWS[1:])

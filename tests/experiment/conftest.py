import pytest

from dinoseg.modes import train
from dinoseg.utils.errors import UserError


@pytest.fixture
def experiments(monkeypatch):
    """Let trainings end with an error where their loop would begin; return what each loop was given."""
    given = []

    def stop(experiment):
        given.append(experiment)
        raise UserError("the loop begins")

    monkeypatch.setattr(train, "fit", stop)
    return given

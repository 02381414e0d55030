"""A log of a training that holds its rows."""

from dinoseg.report.log import RunLog


class Rows(RunLog):
    def __init__(self):
        super().__init__("", visible=False)
        self.rows = []

    def scalars(self, step, values):
        self.rows.append({"step": step, **values})

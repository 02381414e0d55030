"""Pytest plugin: write the CPU seconds of each test, its child processes included, to a CSV file (`make durations`)."""

import csv
import resource
import sys
from collections import defaultdict
from pathlib import Path

import pytest

KEY = "cpu_seconds"
SHOWN = 50
START, END = "<!-- slowest tests -->", "<!-- end of slowest tests -->"


def pytest_addoption(parser):
    parser.addoption("--cpu-durations", metavar="FILE", help="write CPU seconds per test to this CSV file")


def pytest_configure(config):
    if config.getoption("--cpu-durations"):
        config.pluginmanager.register(CpuDurations(config), "cpu_durations")


class CpuDurations:
    """Measure each phase of each test in its worker; add up and write in the process that prints the reports.

    A fixture that several tests share counts for the first of them. A child process counts for the test that waited
    for it.
    """

    def __init__(self, config):
        self.config = config
        self.before = _cpu_seconds()
        self.seconds = defaultdict(float)

    def pytest_collection_finish(self):
        self.before = _cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        now = _cpu_seconds()
        report.user_properties = [*report.user_properties, (KEY, now - self.before)]
        self.before = now
        return report

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += dict(report.user_properties).get(KEY, 0.0)

    def pytest_sessionfinish(self):
        if hasattr(self.config, "workerinput"):  # a worker of xdist, whose reports the controller adds up
            return
        rows = sorted(self.seconds.items(), key=lambda row: -row[1])
        with Path(self.config.getoption("--cpu-durations")).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("cpu_seconds", "test"), *((f"{cpu:.3f}", name) for name, cpu in rows)])


def _cpu_seconds():
    """Return user and system seconds of this process and of the children that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def write_table(durations, page):
    """Write the slowest tests of a CSV file into a page, between its two marks."""
    with Path(durations).open(encoding="utf-8", newline="") as file:
        rows = [(float(row["cpu_seconds"]), row["test"]) for row in csv.DictReader(file)]
    slowest = "\n".join(f"| {cpu:.1f} | `{test}` |" for cpu, test in rows[:SHOWN])
    total = sum(cpu for cpu, _ in rows)
    table = f"{len(rows):,} tests, {total:,.0f} CPU seconds\n\n| CPU seconds | test |\n|---|---|\n{slowest}"
    head, _, rest = Path(page).read_text(encoding="utf-8").partition(START)
    tail = rest.partition(END)[2]
    Path(page).write_text(f"{head}{START}\n\n{table}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    write_table(*sys.argv[1:])

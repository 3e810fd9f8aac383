"What every test process needs before its first test."

import os
import signal
from collections import Counter

import pytest

# No test needs the hub. It is read when huggingface_hub is imported, and without a network each
# question to the hub would cost half a minute of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell that starts a suite in the background leaves Ctrl-C ignored, and every child inherits that.
# The tests of interruptions send the signal to such children, so it must mean what it usually does.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    "A test of the real sets is skipped where they are not."
    if item.get_closest_marker("real_data") and not os.environ.get("KD_NOTES_DATA"):
        pytest.skip("KD_NOTES_DATA does not name a folder with the real sets")


# Few tests and many seconds: each starts processes, builds something, or reads a great many rows.
LONG = ("launch", "site", "wheel", "cluster", "server_pool", "stored_rows", "healed", "operations")


def pytest_collection_modifyitems(items):
    """Put long files first, then those with many tests.

    A worker takes a whole file (--dist loadfile), so a long one at the end would keep one core busy
    and the other idle.
    """
    number = Counter(item.path.stem for item in items)

    def place(item):
        name = item.path.stem
        return name.removeprefix("test_") not in LONG, -number[name]

    items.sort(key=place)


def pytest_make_parametrize_id(config, val, argname):
    "Bytes are no name: a compressed file holds its time, and two workers must collect the same names."
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True, scope="module")
def registered_tasks():
    "The tasks that a file registers are gone behind it: its neighbours on a worker differ."
    from kd_notes.data.examples import TASKS

    before = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(before)

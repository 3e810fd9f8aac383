"What every test process needs before its first test."

import os
import signal

import pytest

# A shell that starts a suite in the background leaves Ctrl-C ignored, and every child inherits that.
# The tests of interruptions send the signal to such children, so it must mean what it usually does.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    "A test of the real sets is skipped where they are not."
    if item.get_closest_marker("real_data") and not os.environ.get("KD_NOTES_DATA"):
        pytest.skip("KD_NOTES_DATA does not name a folder with the real sets")


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

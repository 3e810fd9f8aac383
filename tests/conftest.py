"What every test process needs before its first test."

import signal

# A shell that starts a suite in the background leaves Ctrl-C ignored, and every child inherits that.
# The tests of interruptions send the signal to such children, so it must mean what it usually does.
signal.signal(signal.SIGINT, signal.default_int_handler)

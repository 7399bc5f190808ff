"""The suite runs as several processes (pytest-xdist), which share the cores with the programs that they start."""

import os

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # not in the process that only hands out the tests
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))  # before torch is imported

"""Two test processes share the machine, so each computes with one thread; set before torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

"""What keeps a run alive: ranks that start, agree and fail together; stops; what is told; the run directory."""

import time

STARTED = time.perf_counter()  # of the process, if it imports this first

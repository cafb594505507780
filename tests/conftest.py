"""Eight CPU devices for every test: set before jax starts."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# XLA has a thread per core: with fewer than its devices want, a branch that gathers
# waits for threads that wait for it, for ever. With 8 for 8 devices it still did.
os.environ.setdefault("NPROC", "32")
# A decomposition on each device has threads of its own, which wait for one another:
# 15 s for a matrix of 64 x 96 on two cores in place of 0.07.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

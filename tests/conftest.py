"""Eight CPU devices for every test: set before jax starts."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Each device has threads of its own: with more for a decomposition they wait for one
# another, 15 s for a matrix of 64 x 96 on two cores in place of 0.07.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

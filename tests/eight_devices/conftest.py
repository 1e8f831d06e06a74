"""These tests need eight devices: `tests/test_sharding.py` runs them with as many.

By hand: `JAX_NUM_CPU_DEVICES=8 pytest tests/eight_devices`.
"""

import os

if os.environ.get("JAX_NUM_CPU_DEVICES") != "8":
    collect_ignore_glob = ["test_*.py"]

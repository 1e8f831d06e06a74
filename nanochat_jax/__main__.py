"""`python -m nanochat_jax`, the same as `nanochat-jax`."""

import sys

from nanochat_jax.cli import main

sys.exit(main())

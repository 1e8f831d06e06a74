"""Settings every test shares: the CPU, and no silent promotion of ranks."""

import hypothesis
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Every new shape compiles anew, so deadlines would only measure the compiler.
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=25, derandomize=True
)
hypothesis.settings.load_profile("ci")

"""Settings every test shares: the CPU, and no silent promotion of ranks.

`JAX_PLATFORMS=cuda JAX_DEFAULT_MATMUL_PRECISION=highest` runs them on a GPU.

What one test compiled the others load, those in processes of their own too: programs
are kept in a folder that is deleted when the tests end. Unless `XLA_FLAGS` is set they
are compiled in the quickest way, for tests compile more than they compute; `make
test-all` sets it to nothing.
"""

import atexit
import os
import shutil
import tempfile

import hypothesis
import jax

FOLDER = "JAX_COMPILATION_CACHE_DIR"
if FOLDER not in os.environ:
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="nanochat_jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ[FOLDER], ignore_errors=True)
QUICK = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # later ones know no such flag, and end at once
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))
jax.config.update("jax_compilation_cache_dir", os.environ[FOLDER])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Every new shape compiles anew, so deadlines would only measure the compiler.
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=25, derandomize=True
)
hypothesis.settings.load_profile("ci")

#!/usr/bin/env bash
# A jitted program with over 32 MB of temporaries gets all of them as new pages at every call, on a
# processor under Linux; with far less it gets the pages of the call before.
#
# One would expect a compiled program, whose temporaries are planned and of one size, to keep its
# buffer or to get the same one again. XLA asks the C library for it at each call. That keeps freed
# memory up to a threshold which it raises by itself, to 32 MB at most; what is larger goes back to
# the system, and comes back as pages that the kernel fills with zeros while the program runs. So
# a training step of 70 MB of temporaries has 17,000 page faults, and loses some of its time to them.
# Where the kernel gives large pages to those who ask, GLIBC_TUNABLES=glibc.malloc.hugetlb=1 asks.
#
# Seen with jax and jaxlib 0.10.2: of the pages of 8 MB of temporaries up to 0.15 are new at a call, of
# those of 96 MB all; in between it changes from run to run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 2>/dev/null
env -u GLIBC_TUNABLES -u MALLOC_MMAP_MAX_ JAX_PLATFORMS=cpu "$folder/bin/python" - <<'PY'
import ctypes
import resource

import jax
import jax.numpy as jnp

PAGE, CALLS = 4096, 20
PR_SET_THP_DISABLE = 41  # of prctl.h: count small pages, whatever the kernel prefers
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


@jax.jit
def work(x):
    for _ in range(4):  # products keep the arrays between them apart
        x = jnp.sin(x @ jnp.eye(64, dtype=x.dtype))
    return x.sum()


def faults(megabytes):
    """Returns page faults of a call, over the pages of its temporaries."""
    x = jnp.ones((megabytes * 10**6 // 2 // 4 // 64, 64))
    compiled = work.lower(x).compile()
    planned = compiled.memory_analysis().temp_size_in_bytes
    for _ in range(5):
        compiled(x).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        compiled(x).block_until_ready()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    share = (after - before) / CALLS / (planned / PAGE)
    print(f"{planned / 1e6:.0f} MB of temporaries: {share:.2f} of their pages are new")
    return planned, share


(small, kept), (large, new) = faults(8), faults(96)
assert small < 32 * 2**20 < large, (small, large)
assert kept < 0.5 and new > 0.9, (kept, new)
PY

"""The command line, `nanochat-jax COMMAND`.

Exit codes: 0 done, 2 bad usage, settings or data, 130 interrupted by Ctrl-C, 1 anything
else. This module imports nothing heavy, so that Ctrl-C while packages are imported is
met here.
"""

import os
import sys
from collections.abc import Sequence

_INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      args: Arguments; those of the process if not given.

    Returns:
      The exit code.
    """
    try:
        from nanochat_jax.commands import run

        code = run(sys.argv[1:] if args is None else args)
    except KeyboardInterrupt:
        print("\ninterrupted.", file=sys.stderr)
        code = _INTERRUPTED
    except ModuleNotFoundError as error:
        if str(error.name).startswith("nanochat_jax"):
            raise
        print(f"error: {_absent(error)}", file=sys.stderr)
        return 1
    if args is None and code == _INTERRUPTED:
        # Compilers that still work in other threads crash an interpreter that ends.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _absent(error: ModuleNotFoundError) -> str:
    return (
        f"the package {error.name} is not installed, which this command needs. The "
        "command line comes with `pip install 'nanochat-jax[train]'`."
    )


if __name__ == "__main__":
    sys.exit(main())

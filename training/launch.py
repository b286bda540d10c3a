"""Start a script once per GPU with torchrun, and end as one process would.

It takes torchrun's arguments. `machine.use_all_gpus` replaces the user's process by this one.
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main() -> int:
    """Return the exit code of the process that failed first, or 128 + n for signal n."""
    # The scripts report their errors themselves; a user did not start torchrun.
    logging.disable(logging.ERROR)
    try:
        run(parse_args(sys.argv[1:]))
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        if first.exitcode >= 0:
            return first.exitcode
        name = signal.Signals(-first.exitcode).name
        print(
            f"error: process {rank} was killed by {name}; the same command again goes on from the"
            " last saved state",
            file=sys.stderr,
        )
        return 128 - first.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())

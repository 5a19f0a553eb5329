"""``simclr-scale verify``: whether these machines train as one process would."""

import sys

from simclr_scale.cli.parsing import OneLineErrors
from simclr_scale.errors import InputError, RunFailed
from simclr_scale.evaluation import require_new_file
from simclr_scale.evaluation.manifest import write_json
from simclr_scale.scaling.verify import under_a_launcher, verify_here, verify_in_new_processes

_RANKS = 2

EPILOG = """examples:
  simclr-scale verify
  torchrun --nproc_per_node 8 -m simclr_scale verify
  srun --ntasks-per-node 4 python -m simclr_scale verify --output verify.json
"""


def main(argv: list[str]) -> None:
    """``simclr-scale verify``."""
    parser = OneLineErrors(
        prog="simclr-scale verify",
        usage="%(prog)s --ranks N [options]",
        description="Check that ranks compute together what one process computes, and how fast they talk.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--ranks", type=int | None, help="processes to start here; not under torchrun or srun; default: 2"
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a rank waits for the others")
    parser.add_argument("--output", type=str | None, help="file of the JSON verdict; must not exist")
    arguments = parser.parse_args(argv)
    if arguments.ranks is not None and arguments.ranks < 2:
        raise InputError(f"--ranks must be at least 2, got {arguments.ranks}: one process has nobody to agree with")
    if not 0 < arguments.timeout < 1e6:
        raise InputError(f"--timeout must be above 0 seconds, got {arguments.timeout}")
    output = require_new_file(arguments.output) if arguments.output is not None else None
    environment = under_a_launcher()
    if environment is not None:
        if arguments.ranks is not None:
            raise InputError(
                "--ranks is for one machine without a launcher; here torchrun or SLURM started the processes"
            )
        verdict = verify_here(environment, arguments.timeout)
        if environment.global_rank() != 0:
            # The first rank says it; the launcher wants the status of each.
            sys.exit(1 if verdict.failed else 0)
    else:
        verdict = verify_in_new_processes(arguments.ranks or _RANKS, arguments.timeout)
    verdict.print_table()
    if output is not None:
        write_json(verdict.as_json(), output)
    if verdict.failed:
        count = len(verdict.outcomes)
        raise RunFailed(f"{len(verdict.failed)} of {count} checks failed: {'; '.join(verdict.failed)}")

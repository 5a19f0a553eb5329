"""Do these machines train as one? Checks that any user can run under any launcher."""

from simclr_scale.scaling.verify.launching import under_a_launcher, verify_here, verify_in_new_processes
from simclr_scale.scaling.verify.outcomes import Verdict

__all__ = ["Verdict", "under_a_launcher", "verify_here", "verify_in_new_processes"]

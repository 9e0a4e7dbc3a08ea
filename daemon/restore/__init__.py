"""From a bundle to a living agent: `restore_to_directory` and `restore_agent`.

Everything is fetched, verified and put together in scratch on the target's own file system first; one
rename makes it visible. What is live is never replaced here: a target that holds anything is refused.
"""

from daemon.restore.place import RestoreReport, restore_agent, restore_to_directory

__all__ = ["RestoreReport", "restore_agent", "restore_to_directory"]

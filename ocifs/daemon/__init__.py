"""The life of a mount: claim the place, mount, tell who waits when it answers, end cleanly however it ends.

A mount is one process. The command opens the image (which may index layers for a while, with a progress bar), claims the
mount point, starts a daemon, and waits until it says that the mount has answered a stat(2), or why not. A command that is
ended before it has heard that leaves neither daemon nor mount.

How a mount ends
    SIGTERM, SIGINT, SIGHUP or an unmount by anyone: the session loop returns, the mount is taken down if it is still there,
    the record goes, exit status 0. Data that cannot be read, from a server that is gone, keeps it waiting for seconds only
    (`ocifs.driver.session`). After kill -9 the kernel answers ENOTCONN on the mount point; the next ``ocifs mount`` or
    ``ocifs umount`` of that directory removes the dead mount.

    Under the ``erofs`` driver the mount itself outlives a killed daemon and answers ENOTCONN or EIO for what the kernel has
    not cached; those two commands find it by the record that nobody has locked.

=============  ==================================================================
`records`      who is mounted where, and whether their daemons live
`mountpoints`  directories: checked, unmounted, their users named
`running`      serving in the foreground or as a daemon
`logs`         where the log goes
`notify`       telling a service manager
`statistics`   asking a daemon what it has done
=============  ==================================================================
"""

from ocifs.daemon.mountpoints import check_machine, clean_up, end, prepare_mountpoint, statistics_at, unmount, users_of
from ocifs.daemon.records import FS_TYPES, Claim, Listed, Record, State, records, runtime_dir
from ocifs.daemon.running import now_ns, private_place, run_background, run_foreground
from ocifs.daemon.statistics import statistics_of

__all__ = [
    "FS_TYPES",
    "Claim",
    "Listed",
    "Record",
    "State",
    "check_machine",
    "clean_up",
    "end",
    "now_ns",
    "prepare_mountpoint",
    "private_place",
    "records",
    "run_background",
    "run_foreground",
    "runtime_dir",
    "statistics_at",
    "statistics_of",
    "unmount",
    "users_of",
]

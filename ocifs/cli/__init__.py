"""The command ``ocifs``: the words a person types, and what they read.

=================  ====================================================================================================
this module        `main`: the one place where errors become sentences and exit statuses
`commands`         which commands there are, and the module that each is loaded from when it is asked for
`options`          the options that commands share, and opening an image as they say
`output`           standard output and standard error: names, JSON, tables, sizes, times
`progress`         the bar on a terminal
`signals`          ending on a signal as after ^C
`listing`          ``ls``, ``stat``
`reading`          ``cat``, ``blob``
`remains`          ``deleted``, ``wasted``
`comparing`        ``diff``
`auditing`         ``audit``
`copying`          ``cp``, on top of `unpack`, which writes files and directories safely
`exporting`        ``export``, on top of `ocifs.archive`, which writes tar headers
`bundling`         ``bundle``, ``unbundle``, ``run``
`changing`         ``diff-upper``, ``commit``
`documents`        ``inspect``, ``layers``, ``index``
`mounting`         ``mount``, ``umount``, ``ps``, ``stat-mount``
`caching`          ``cache info|ls|gc|clear``
`machine`          ``doctor``
`shell`            ``completion``
`fstab`            ``install-helper``, ``mount-helper``
=================  ====================================================================================================

Start-up time is part of the interface: this module and `commands` import nothing but click, a family's module imports
what its commands need when they run, and only ``mount`` loads FUSE and an event loop.

Of the CPU time of ``ocifs log`` on an indexed image, 100 ms, Python and click take 40, reading and answering 10, and
importing the rest; of the 200 of ``ocifs mount``, pyfuse3 and trio take 75 (with what neither needs for us: OpenSSL's
sockets, a look at pyfuse3's own version, and a run of ldconfig for the name of the thread library). Defining a dataclass
takes 0.25 to 0.6 ms, a NamedTuple 0.1, a msgspec Struct 0.01. The garbage collector took a sixth of a short command, most
of it at its end (`_spare_collections`). Measured on one machine as user and system time, the least of many runs, and by
``python -X importtime``.

Not here: anything that another program could not ask of the rooms below.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

import click

from ocifs.errors import NotFoundError, OcifsError

EXIT_USAGE: Final = 2
EXIT_BUG: Final = 70
"""EX_SOFTWARE of sysexits.h: something that nobody foresaw."""
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
_YOUNG: Final = 10_000
"""Objects made before the youngest are looked through for cycles; Python's own (700 in 3.11) is for smaller programs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit status: every way it can end is decided here.

    An expected failure is one sentence on standard error and the status its class carries. Whoever reads standard
    output and goes away ends us as it ends cat(1): by SIGPIPE, without a word.
    """
    if arguments is None:  # else the process is not ours
        _spare_collections()
    _fill_standard_streams()
    # Whoever started us may have ignored it, and then the system would not say how the processes that we start end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    from ocifs.cli.commands import ocifs  # commands imports what this module offers
    from ocifs.cli.output import complain, discard_output, flush, sentence

    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if "_OCIFS_COMPLETE" in os.environ:
            ocifs.main(words, "ocifs")  # a shell asks what can follow: click answers and exits
        # Not ocifs.main(): that has an opinion of its own on Ctrl-C and on broken pipes.
        with ocifs.make_context("ocifs", words) as context:
            ocifs.invoke(context)
        flush()
    except BrokenPipeError:
        discard_output()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
        return 128 + signal.SIGPIPE  # the signal was blocked
    except OcifsError as error:
        complain(str(error))
        return _after_output(error.exit_code)
    except click.exceptions.Exit as error:
        return _after_output(error.exit_code)
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "ocifs"
        complain(f"{sentence(error.format_message())}; see '{path} --help'")
        return _after_output(EXIT_USAGE)
    except (KeyboardInterrupt, click.Abort):
        discard_output()
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 (the last boundary: a bug must read like one, not like a crash)
        if isinstance(error.__cause__, KeyboardInterrupt):  # Python 3.11 wraps one that comes while a class is made
            discard_output()
            return EXIT_INTERRUPTED
        return _unforeseen(error)
    return 0


def _spare_collections() -> None:
    """Look for cycles less often, and not at all when the process ends.

    Python ends by looking through every object there is for cycles, twice, to free memory that the system is about to take
    back: 20 ms of 150 for ``ocifs log``, 40 of 250 for ``ocifs mount``. Everything else still happens at the end as usual:
    functions of atexit, streams flushed, threads waited for. Memory that no cycle holds is freed at once, as ever.
    """
    _, *older = gc.get_threshold()
    gc.set_threshold(_YOUNG, *older)
    atexit.register(gc.freeze)


def _fill_standard_streams() -> None:
    """Open what whoever started us had closed: else the next file that is opened takes its place, and its output.

    For the processes that we start as well.
    """
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
            os.set_inheritable(opened, True)  # noqa: FBT003 (its only signature)


def _after_output(status: int) -> int:
    """Bring out what was written before the failure; the failure is what counts if that fails too."""
    from ocifs.cli.output import discard_output, flush

    try:
        flush()
    except (OSError, OcifsError):
        discard_output()
    return status


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _unforeseen(error: Exception) -> int:
    """Call it a bug, but for two things that can happen to every command.

    The working directory may be gone. And click may not be able to write: what --help and --version print goes out through
    click alone.
    """
    import logging
    import traceback

    from ocifs.cli.output import complain, discard_output, unwritable

    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    if isinstance(error, OSError) and click.echo.__code__ in frames:
        failed = unwritable(error)
        complain(str(failed))
        discard_output()
        return failed.exit_code
    if isinstance(error, FileNotFoundError) and not _has_working_directory():
        complain("the working directory is gone; change to one that is there, or give absolute paths")
        discard_output()
        return NotFoundError.exit_code
    if logging.getLogger("ocifs").isEnabledFor(logging.INFO):
        traceback.print_exception(error)
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    complain(f"this is a bug, please report it with the command you ran and what it prints with -v: {what}")
    discard_output()
    return EXIT_BUG

"""Telling a service manager how a service is: sd_notify(3)'s protocol, a datagram to the socket that it names.

Not here: what there is to tell.
"""

from __future__ import annotations

import contextlib
import os
import socket


def tell(*lines: str) -> None:
    """Send assignments (``READY=1``) to the service manager that started us, if one did and wants to know."""
    address = os.fsencode(os.environ.get("NOTIFY_SOCKET", ""))
    if not address:
        return
    if address.startswith(b"@"):  # the abstract name space, unix(7)
        address = b"\0" + address[1:]
    # One assignment a line, whatever a file is called.
    told = "\n".join(line.replace("\n", " ") for line in lines).encode(errors="backslashreplace")
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.sendto(told, address)

"""The attribute ``security.capability``: what a file's capabilities are, in the words of getcap(8).

The value is ``struct vfs_cap_data`` of include/uapi/linux/capability.h, little-endian: a word with the revision in its
highest byte and a flag in its lowest bit (all that is permitted or inheritable is effective as well), then pairs of words,
permitted and inheritable: one pair in revision 1, two in revisions 2 and 3, the lower 32 capabilities first. Revision 3
ends with the user, of the namespace that the file system belongs to, who is root where the capabilities count. The kernel
takes no other size for a revision.

The text is that of libcap's cap_to_text(3): what most capabilities have stands first behind a ``=``, unless it is
nothing; then lists of those that have something else.

Not here: whether a file should have them (`ocifs.forensics.audit`).
"""

from __future__ import annotations

import struct
from typing import Final

XATTR: Final = b"security.capability"

NAMES: Final = (
    *("cap_chown", "cap_dac_override", "cap_dac_read_search", "cap_fowner"),
    *("cap_fsetid", "cap_kill", "cap_setgid", "cap_setuid"),
    *("cap_setpcap", "cap_linux_immutable", "cap_net_bind_service", "cap_net_broadcast"),
    *("cap_net_admin", "cap_net_raw", "cap_ipc_lock", "cap_ipc_owner"),
    *("cap_sys_module", "cap_sys_rawio", "cap_sys_chroot", "cap_sys_ptrace"),
    *("cap_sys_pacct", "cap_sys_admin", "cap_sys_boot", "cap_sys_nice"),
    *("cap_sys_resource", "cap_sys_time", "cap_sys_tty_config", "cap_mknod"),
    *("cap_lease", "cap_audit_write", "cap_audit_control", "cap_setfcap"),
    *("cap_mac_override", "cap_mac_admin", "cap_syslog", "cap_wake_alarm"),
    *("cap_block_suspend", "cap_audit_read", "cap_perfmon", "cap_bpf"),
    "cap_checkpoint_restore",
)
"""By number, as in include/uapi/linux/capability.h."""

_BITS: Final = 64
_PAIRS: Final = {1: 1, 2: 2, 3: 2}
"""By revision."""
_ROOTED: Final = 3
_EFFECTIVE: Final = 1
_FLAGS: Final = ((1, "e"), (4, "i"), (2, "p"))
"""The bits of a capability's state, in the order of their letters."""


def capability_text(value: bytes) -> str:
    """Say what the attribute's value means. Raises `ValueError` if the kernel would not take it."""
    if len(value) < struct.calcsize("<I"):
        raise ValueError(f"{len(value)} bytes are too few")
    (magic,) = struct.unpack_from("<I", value)
    revision = magic >> 24
    pairs = _PAIRS.get(revision)
    if pairs is None:
        raise ValueError(f"revision {revision} is not known")
    size = 4 + 8 * pairs + (4 if revision == _ROOTED else 0)
    if len(value) != size:
        raise ValueError(f"revision {revision} has {size} bytes, not {len(value)}")
    words = struct.unpack_from(f"<{2 * pairs}I", value, 4)
    permitted = sum(word << 32 * number for number, word in enumerate(words[::2]))
    inheritable = sum(word << 32 * number for number, word in enumerate(words[1::2]))
    effective = permitted | inheritable if magic & _EFFECTIVE else 0
    states = [
        (effective >> bit & 1) | (permitted >> bit & 1) << 1 | (inheritable >> bit & 1) << 2 for bit in range(_BITS)
    ]
    text = _text(states)
    if revision == _ROOTED:
        (root,) = struct.unpack_from("<I", value, size - 4)
        text += f" [rootid={root}]" if root else ""
    return text


def _text(states: list[int]) -> str:
    named = states[: len(NAMES)]
    usual = max(range(8), key=lambda state: (named.count(state), -state))
    parts = [f"={_letters(usual)}"] if usual else []
    for state in range(7, -1, -1):
        bits = [bit for bit, found in enumerate(states) if found == state and (bit < len(NAMES) or found)]
        if state == usual or not bits:
            continue
        more, less = state & ~usual, usual & ~state
        sign = "+" if parts else "="
        change = (sign + _letters(more) if more else "") + ("-" + _letters(less) if less else "")
        parts.append(",".join(NAMES[bit] if bit < len(NAMES) else str(bit) for bit in bits) + change)
    return " ".join(parts) or "="


def _letters(state: int) -> str:
    return "".join(letter for bit, letter in _FLAGS if state & bit)

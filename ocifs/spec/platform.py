"""Platforms: what an image runs on, and whether that is what was asked for (rule C9).

Not here: choosing among the manifests of an index (`ocifs.sources`).
"""

from __future__ import annotations

import platform as _platform
import re
import sys
from typing import Final

import msgspec

from ocifs.errors import UsageError
from ocifs.spec.quoting import printable, quoted

_OS_ALIASES: Final = {"macos": "darwin"}
_ARCHITECTURE_ALIASES: Final = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "loongarch64": ("loong64", ""),
}
# A machine of one variant runs the ones behind it. An absent variant means the third column of each architecture.
_VARIANTS: Final = {
    "arm": ("v8", "v7", "v6", "v5"),
    "arm64": ("v9", "v8"),
    "amd64": ("v4", "v3", "v2", "v1"),
}
_DEFAULT_VARIANT: Final = {"arm": "v7", "arm64": "v8", "amd64": "v1"}
_PLATFORM: Final = re.compile(r"([A-Za-z0-9_.-]+)/([A-Za-z0-9_.-]+)(?:/([A-Za-z0-9_.-]+))?")


class Platform(msgspec.Struct, frozen=True):
    """What an image runs on (image-spec image-index.md, ``platform``). Words are kept as they are written."""

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""
    os_features: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Give ``os/arch[/variant]``, fit for a message."""
        words = (self.os or "unknown", self.architecture or "unknown", self.variant)
        return printable("/".join(word for word in words if word))

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read ``os/arch[/variant]`` as a user types it; UsageError if it is not of that form."""
        match = _PLATFORM.fullmatch(text)
        if match is None:
            raise UsageError(f"{quoted(text)} is not a platform such as linux/amd64 or linux/arm64/v8")
        return cls(match[1], match[2], match[3] or "")

    @classmethod
    def host(cls) -> Platform:
        """Give this machine's platform. Mounting needs Linux, so the operating system is always ``linux``."""
        machine = _platform.machine().lower()
        if machine in {"mips", "mips64", "ppc64"} and sys.byteorder == "little":
            machine += "le"
        return cls("linux", *_ARCHITECTURE_ALIASES.get(machine, (machine, "")))

    @property
    def is_known(self) -> bool:
        """False for ``unknown/unknown``, which BuildKit gives attestation manifests, and where nothing is said."""
        return self.os not in {"", "unknown"} or self.architecture not in {"", "unknown"}

    def _normalized(self) -> tuple[str, str, str]:
        os = self.os.lower()
        architecture = self.architecture.lower()
        variant = self.variant.lower()
        os = _OS_ALIASES.get(os, os)
        architecture, alias_variant = _ARCHITECTURE_ALIASES.get(architecture, (architecture, ""))
        variant = variant or alias_variant
        if architecture in _VARIANTS:
            variant = f"v{variant}" if variant[:1].isdigit() else variant or _DEFAULT_VARIANT[architecture]
        return os, architecture, variant

    def rank_for(self, wanted: Platform) -> int | None:
        """How well an image of this platform runs where ``wanted`` is asked for: 0 best, None not at all (rule C9).

        ``arm64`` is ``arm64/v8``; an older variant of the same architecture also runs, and ranks behind.
        """
        os, architecture, variant = self._normalized()
        wanted_os, wanted_architecture, wanted_variant = wanted._normalized()
        if (os, architecture) != (wanted_os, wanted_architecture):
            return None
        if wanted.os_version and wanted.os_version != self.os_version:
            return None
        if variant == wanted_variant or not wanted_variant:
            return 0
        order = _VARIANTS.get(architecture, ())
        if variant in order and wanted_variant in order:
            behind = order.index(variant) - order.index(wanted_variant)
            return behind if behind > 0 else None
        return None

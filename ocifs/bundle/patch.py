"""JSON merge patch (RFC 7396): what ``--config-patch`` does to a ``config.json``.

Pure. Not here: whether the outcome is a configuration (a runtime decides).
"""

from __future__ import annotations

from typing import Any


def merge_patch(target: Any, patch: Any) -> Any:  # noqa: ANN401 (any JSON value onto any other: that is the RFC)
    """Give ``target`` as ``patch`` would have it: members that are null go, objects are merged, all else replaces.

    Neither argument is changed. RFC 7396, section 2. Nesting is that of the patch, which JSON's reader has bounded.
    """
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged

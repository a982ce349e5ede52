"""ZMLX's capability detection: `hasattr(mx, "gather_qmm_swiglu")`."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from . import _core

_NAME = "gather_qmm_swiglu"
_ABSENT = object()
_replaced: object = _ABSENT


def has_zmlx_primitive() -> bool:
    """True while mx.gather_qmm_swiglu is ours."""
    return getattr(mx, _NAME, None) is _core.gather_qmm_swiglu


def install_zmlx_primitive() -> Callable | None:
    """Set mx.gather_qmm_swiglu to ours; a second call changes nothing.

    ZMLX looks once and remembers, so call this before its first patch. Returns what was there
    before ours, or None.
    """
    global _replaced
    if not has_zmlx_primitive():
        _replaced = getattr(mx, _NAME, _ABSENT)
        setattr(mx, _NAME, _core.gather_qmm_swiglu)
    return None if _replaced is _ABSENT else _replaced


def uninstall_zmlx_primitive() -> None:
    """Put back what install_zmlx_primitive() found; a no-op when it was not called."""
    global _replaced
    if has_zmlx_primitive():
        if _replaced is _ABSENT:
            delattr(mx, _NAME)
        else:
            setattr(mx, _NAME, _replaced)
    _replaced = _ABSENT

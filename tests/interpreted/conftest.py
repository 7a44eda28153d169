"""What the files of this folder run on: CPU tensors under Triton's interpreter, or CUDA.

pytest does not collect them by itself (their names do not begin with test_): TRITON_INTERPRET must be set
before triton is imported, and it would break every other test that compiles. tests/test_kernels.py runs them,
each in a process of its own.
"""

import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor_numpy24(tensor: Any, scope: Any) -> None:
        # The interpreter keeps a scalar as an array of shape [1], which NumPy >= 2.4 no longer turns into an
        # int.
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
        scope.set_attr(tensor, "__int__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor_numpy24

    _cast = interpreter.InterpreterBuilder.cast_impl

    def _cast_to_nearest(self: Any, src: Any, dst_type: Any) -> Any:
        # The interpreter truncates where every GPU rounds to nearest even (tests/test_kernels_aot.py finds the
        # instruction): twice the error that the certificate allows for.
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return _cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        kept = np.where(np.isnan(src.data), (bits >> 16) | 0x40, rounded)
        return interpreter.TensorHandle(kept.astype(np.uint16), tl.bfloat16)

    # The builder's conversions call cast_impl by name.
    interpreter.InterpreterBuilder.cast_impl = _cast_to_nearest

    _patch_lang, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    _patched: set[tuple[int, ...]] = set()  # the modules of the language that this launch has patched

    def _patch_lang_once(function: Any) -> Any:
        # The interpreter looks through the whole language again at every call of a function in a kernel, and
        # spends half of its time on that: what was patched since the launch began still is.
        seen = tuple(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if seen in _patched:
            return interpreter._LangPatchScope()
        _patched.add(seen)
        return _patch_lang(function)

    def _launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        _patched.clear()
        return _launch(self, *args, **kwargs)

    interpreter._patch_lang = _patch_lang_once
    interpreter.GridExecutor.__call__ = _launch_anew

    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _as_tensor_cores_read(handle: Any, input_precision: Any) -> Any:
        # The interpreter keeps bfloat16 as its bits, and multiplies those.
        if handle.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if handle.dtype.scalar == tl.float32 and "TF32" in str(input_precision):
            truncated = handle.data.view(np.uint32) & np.uint32(0xFFFFE000)
            return interpreter.TensorHandle(truncated.view(np.float32), tl.float32)
        return handle

    def _create_dot_of_bits(self: Any, a: Any, b: Any, d: Any, input_precision: Any, *rest: Any) -> Any:
        a, b = _as_tensor_cores_read(a, input_precision), _as_tensor_cores_read(b, input_precision)
        return _create_dot(self, a, b, d, input_precision, *rest)

    interpreter.InterpreterBuilder.create_dot = _create_dot_of_bits


@pytest.fixture(autouse=True)
def _numpy_as_quiet_as_a_gpu() -> Iterator[None]:
    """What the interpreter computes in numpy may overflow or be undefined without a word on a GPU."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        yield


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"

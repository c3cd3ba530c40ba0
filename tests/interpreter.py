"""Triton's interpreter as tests need it: with the products of a GPU, and faster."""


def play_gpu(patch):
    """Change the interpreter as long as the patch (pytest.MonkeyPatch) lasts; $TRITON_INTERPRET must be 1."""
    from triton.runtime import interpreter

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", _one_chain)
    _patch_once(patch, interpreter)


def _one_chain(builder, a, b, d, input_precision, max_num_imprecise_acc):
    """The interpreter's products, as a GPU makes them: numpy's library treats rows by their place in a tile."""
    from triton.runtime.interpreter import TensorHandle

    left, right, total = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype), d.data.copy()
    for k in range(len(right)):
        total += left[:, k, None] * right[k]
    return TensorHandle(total, d.dtype.scalar)


def _patch_once(patch, interpreter):
    """Let the interpreter patch Triton's language once, not in every launch and call: that is most of its time."""
    from triton import language

    from hpcinfer.kernels.gpu import rows

    for function in (rows.silu_times, language.zeros):  # one sees triton.language, the other triton.language.core
        interpreter._patch_lang(function.fn)
    patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
    patch.setattr(interpreter.InterpretedFunction, "__call__",
                  lambda function, *args, **kwargs: function.rewrite()(*args, **kwargs))  # fmt: skip

"""Triton's interpreter, mended for releases that fall behind numpy."""

import importlib.util

if importlib.util.find_spec("triton"):
    from triton import __version__ as version
    from triton.runtime import interpreter


def mend() -> None:
    """Triton 3.6 takes an array of one element for an int, which numpy 2.4 refuses."""
    if not importlib.util.find_spec("triton") or not version.startswith("3.6."):
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_squeeze(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_and_squeeze

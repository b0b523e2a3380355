"""Fused operators of fewstep: importing this package needs neither triton nor a GPU.

Import it as `fewstep.kernels`. The Hub's own package is also called `kernels`, and transformers and diffusers
probe for it; with the repository root on `sys.path` (`python -m pytest`, `python -c`) they find this folder
instead. Run under that name, the module steps aside.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType


def _step_aside() -> None:
    """Put the installed `kernels` in this module's place, or an empty module where there is none.

    The empty one has no `__file__`, and a version older than any: the probes take that for "not installed". Raising
    instead would break transformers, whose probe imports unguarded; before 5.12 it also parses the version unguarded.
    """
    # Another clone on the path steps aside in its turn, and must not come back to this one.
    passed = {Path(__file__).resolve().parent.parent, *globals().get("_passed", ())}
    behind = [entry for entry in sys.path if Path(entry or ".").resolve() not in passed]
    for finder in sys.meta_path:
        spec = finder.find_spec("kernels", behind)
        if spec is not None and spec.loader is not None:
            installed = module_from_spec(spec)
            sys.modules["kernels"] = installed
            vars(installed)["_passed"] = passed
            spec.loader.exec_module(installed)
            del vars(installed)["_passed"]
            return
    empty = ModuleType("kernels", "Empty: the Hub's `kernels` package is not installed.")
    empty.__spec__ = ModuleSpec("kernels", None)
    vars(empty)["__version__"] = "0"
    sys.modules["kernels"] = empty


if __name__ == "kernels":
    _step_aside()
else:
    from .backends import use_backend
    from .function_mode import ForwardModeAttention
    from .interface import attention, attention_jvp

    __all__ = ["ForwardModeAttention", "attention", "attention_jvp", "use_backend"]

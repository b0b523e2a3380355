"""What other libraries say beside our own lines, silenced: their hints, deprecations and bars over a handful of files.

Errors stay, and so do the bars of downloads from the hub.
"""

import logging
import os
import sys
import warnings

VARIABLES = {  # read by the libraries when they are imported; values of the user's own stay
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def quiet() -> None:
    """Before the libraries are imported, and once more before they are used: the bars of diffusers and transformers
    have no variable. Imports nothing itself."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    logging.getLogger("torch.utils._pytree").addFilter(_is_not_of_enums)
    with_jit = r"`?torch\.jit\.script(_method)?`? is (deprecated|not supported)"
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", message=with_jit, category=category)
    for library in ("diffusers", "transformers"):
        module = sys.modules.get(f"{library}.utils.logging")
        if module is not None:
            module.disable_progress_bar()
            if os.environ[f"{library.upper()}_VERBOSITY"] == "error":
                module.set_verbosity_error()
    hub = sys.modules.get("huggingface_hub.utils")
    if hub is not None and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        hub.enable_progress_bars()  # which transformers has turned off with its own


def _is_not_of_enums(record: logging.LogRecord) -> bool:
    """torchao registers its enumerations in a way that torch calls deprecated."""
    return "Enum subclass" not in str(record.msg)

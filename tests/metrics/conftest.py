from ..scoring import data_folder, extractor, lite0, lite2, scored_here  # noqa: F401
from ..tiny_inception import inception, picture_sets, weights  # noqa: F401

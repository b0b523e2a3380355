"""Pictures made, scored and compared: evaluate, sample, compare and the page."""

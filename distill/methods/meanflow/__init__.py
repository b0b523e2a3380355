"""MeanFlow: the mean velocity between two times, from data or from a teacher."""

"""InterLCM: restoration that begins at a middle time of a consistency model."""

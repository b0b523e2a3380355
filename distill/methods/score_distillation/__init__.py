"""rCM, sCM and DMD2: consistency by derivatives, and matching of scores."""

"""Sources of candidates: a metadata table, a known data set layout, archives, or a walk through a folder."""

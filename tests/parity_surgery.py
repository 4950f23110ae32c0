"Recomputes the golden vectors of CLIP Surgery and of the localisation head."
from parity_surgery_maps import map_rows


def compute(stored, config):
    "(file stem, name) -> recomputed tensor with its tolerance."
    return map_rows(stored, config)

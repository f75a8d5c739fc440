"""Generate IRP data sets: which weights of which networks survive, and what they looked like at initialization."""

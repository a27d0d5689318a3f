"""How good generated images are: detectors, streaming statistics, metrics as pure functions of what was gathered."""

"""Sampling: solvers on `denoise(x, sigma)`, guidance as a wrapper of denoisers, seeds to images."""

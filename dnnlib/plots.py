"""What all plots need."""

import importlib.util

from dnnlib.errors import UserError


def require_matplotlib() -> None:
    """Raise a UserError where matplotlib is missing."""
    if importlib.util.find_spec('matplotlib') is None:
        raise UserError('a plot needs matplotlib: pip install matplotlib')

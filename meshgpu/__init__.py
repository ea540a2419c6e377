"""The GPUs of an office as one mesh, without a central server."""

__version__ = "0.1.0"
__all__ = ["__version__"]

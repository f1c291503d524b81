"""The version of the package: the one place where it is written (the build reads it from here without importing)."""

__version__ = "0.1.0"

"""The version, written in this one place; the build and CMake read it from here."""

__version__ = "0.1.0"

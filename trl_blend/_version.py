"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version


try:
    __version__ = version("trl_blend")
except PackageNotFoundError:  # a checkout on the path that nobody installed
    __version__ = "0+unknown"

"""The version of the package, and the versions that read each file format."""

__version__ = "0.1.0"

# Version of the file format -> the first version of this package that reads it.
FIRST_READERS = {1: "0.1.0", 2: "0.1.0"}

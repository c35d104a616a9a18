"""The name and version of the distribution, and nothing else, because ``setup.py`` reads this file too."""

VERSION = "0.1.0"
DISTRIBUTION = "sparsekit-kernels"  # the package index has another project called sparsekit

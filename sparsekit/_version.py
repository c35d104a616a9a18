"""What the package is called and which version it is; nothing else, since ``setup.py`` reads this file too."""

VERSION = "0.1.0"
DISTRIBUTION = "sparsekit-kernels"  # the index has another project under the import's name

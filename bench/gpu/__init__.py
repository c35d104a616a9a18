"""One command on a machine with a GPU: `make gpu`, or `python -m bench.gpu --out DIR`."""

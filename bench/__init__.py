"""Speed against named baselines: `python -m bench` (or `make bench`) measures, `python -m bench.report` prints."""

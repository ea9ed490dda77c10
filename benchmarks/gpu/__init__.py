"""The parts of `benchmarks/gpu_suite.py`: each offers ``rows(suite)``, what it measures, first things first."""

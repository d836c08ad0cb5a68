"""Everything to measure on a CUDA machine, by one command in less than eight minutes: `python3 -m benchmarks.gpu`."""

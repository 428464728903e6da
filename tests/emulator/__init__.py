"""The CUDA emulator of the tests: the project's kernels, compiled for the CPU (see README.md)."""

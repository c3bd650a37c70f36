"""The ops in C++ for CPUs: one library for each instruction set, the best of them chosen when it is loaded."""

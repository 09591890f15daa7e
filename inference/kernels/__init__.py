"""C++ kernels for CPUs, and the code that compiles and calls them; imports inference.options, model and common."""

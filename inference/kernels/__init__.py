"""C++ kernels for CPUs and the code that compiles and calls them; imports model and common."""

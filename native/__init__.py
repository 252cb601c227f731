"""Sources of CUDA C++ that are compiled at run time, and of the C++ library that the build makes."""

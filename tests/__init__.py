"""The tests of pybustcall."""

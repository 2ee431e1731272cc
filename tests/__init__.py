"""The tests: a package, so that another distribution's top-level "tests" (verl installs one) is not taken for it."""

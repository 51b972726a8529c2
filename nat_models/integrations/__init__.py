"""Forms of this package that other packages and the code written for them expect; each is imported by name."""

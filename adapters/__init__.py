"""One short module a framework; none is imported before it is asked for."""

"""From a precision assignment to a graph in which every type is explicit."""

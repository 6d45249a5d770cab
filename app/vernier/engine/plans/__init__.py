"""The life of a package's plans on its GPUs."""

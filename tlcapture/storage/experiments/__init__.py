"""Where everything is in a root and an experiment: paths, config, datasets, the index of files."""

"""One YAML file and its run folder, and the command line."""

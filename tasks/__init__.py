"""One file a task; its name is the name on the command line."""

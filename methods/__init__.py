"""One file a method; its name is the name on the command line."""

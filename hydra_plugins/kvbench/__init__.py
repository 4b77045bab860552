"""kvbench's launchers, where Hydra looks for them."""

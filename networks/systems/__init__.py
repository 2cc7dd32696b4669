"""One file for each system; its name is what `--model` and `build_network` take. See docs/adding_a_system.md."""

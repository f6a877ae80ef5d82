"""What every command stands on and that knows no encoder and no recipe: files, checkpoints, processes, signals, settings, text."""

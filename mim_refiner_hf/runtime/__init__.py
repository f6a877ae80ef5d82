"""What every command stands on: files, checkpoints, processes, signals, settings, text.

Nothing here knows an encoder or a recipe.
"""

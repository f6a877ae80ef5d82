"""One plain ViT for every family, which travels with every saved model; it imports only itself.

Configuration, modules, positions and preprocessing: each is a file, loaded by name.
"""

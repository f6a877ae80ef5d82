"""One plain ViT for every family: configuration, modules, positions, preprocessing. It travels with every saved model."""

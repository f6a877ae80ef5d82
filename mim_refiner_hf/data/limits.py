"""Limits that settings have as their defaults; nothing is imported here: `--help` shows them."""

# A crawl of the web has a percent or two of broken images; what is wrong as a whole, such as a
# half-finished copy, has far more.
MAX_BAD_FRACTION = 0.05

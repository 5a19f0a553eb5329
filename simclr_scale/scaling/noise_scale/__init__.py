"""The gradient noise scale: how large a batch still pays."""

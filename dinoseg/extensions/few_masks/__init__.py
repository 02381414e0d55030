"""Training with few masks and many images: FixMatch and UniMatch V2."""
